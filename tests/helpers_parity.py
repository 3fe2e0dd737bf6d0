"""What imported networks compute, against the outputs of their authors' code."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from helpers_golden import about, golden, images_of, state_dict
from safetensors.torch import save_file

from graincode.interop.convert import import_tokenizer
from graincode.interop.dqvae import THRESHOLDS
from graincode.interop.names import Options

NETWORKS = {
    "dqvae_dual_entropy": "dqvae",
    "dqvae_dual_feature": "dqvae",
    "dqvae_triple_feature": "dqvae",
    "vqgan_f16": "vqgan",
    "llamagen_vq16": "llamagen",
    "maskgit_vqgan": "maskgit",
    "open_magvit2": "magvit2",
    "diffusers_vqmodel": "diffusers",
}
"""The golden networks, and the family of each."""


def write_golden(network: str, path: Path) -> Path:
    """The weights of a golden network, in a file, or for diffusers a folder, as its authors write it."""
    names = state_dict(network)
    if NETWORKS[network] == "diffusers":
        path.mkdir()
        (path / "config.json").write_text(json.dumps(about(network)["small"]["config"]))
        save_file(names, path / "diffusion_pytorch_model.safetensors")
        return path
    if NETWORKS[network] in ("vqgan", "dqvae", "magvit2"):
        names |= {"loss.logvar": torch.zeros(())}
    key = {"llamagen": "model", "maskgit": None}.get(NETWORKS[network], "state_dict")
    torch.save({key: names} if key else names, path)
    return path


def import_golden(network: str, folder: Path):
    """A golden network, imported from a file in a folder."""
    options = Options(golden(network)["image"].shape[1])
    if network == "dqvae_dual_entropy":  # computed in the current definition, with the published thresholds
        table = folder / "thresholds.json"
        table.write_text(json.dumps({0: 0.0, **THRESHOLDS, 100: math.log(32)}))
        options = replace(options, thresholds=table, entropy="current")
    return import_tokenizer(NETWORKS[network], write_golden(network, folder / f"{network}.pt"), options)


@torch.no_grad()
def differences(module, network: str, dtype: torch.dtype, count: int | None = None) -> dict[str, tuple[float, float]]:
    """Of each output for the first images (None: all), the largest absolute difference from the authors', and the same
    over their largest value; of indices and grains, the share that differs, twice."""
    found, family = {name: value[:count] for name, value in golden(network).items() if value.ndim}, NETWORKS[network]
    images, layout = images_of(found, dtype), module.layout
    module = module.to(dtype).eval()
    maps, codes, whole = module.encoder(images), module.tokenize(images), module(images)
    made = dict(zip(_features(layout.num_grains), maps, strict=True))
    chosen = sum(layout.expand(x * layout.cells_at(codes.grains, g)[:, None], g) for g, x in enumerate(maps))
    made["latent"] = module.project_in(chosen.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    made["reconstruction"] = whole.images[:, :, ::2, ::2]  # the golden files hold every second row and column
    if family == "maskgit":
        made["reconstruction"] = (made["reconstruction"] + 1) / 2
    if family == "magvit2":  # whose codes have their channels in the other order
        made["features"] = made["features"].flip(1)
    made |= {"indices": codes.indices, "grains": codes.grains}
    return {name: _difference(value, found[name]) for name, value in made.items() if name in found}


def _features(grains: int) -> list[str]:
    middle = {1: ["features"], 2: ["features_coarse", "features_fine"]}
    return middle.get(grains, ["features_coarse", "features_median", "features_fine"])


def _difference(value: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    if not value.is_floating_point():
        return (float((value != wanted).double().mean()),) * 2
    largest = float((value - wanted).abs().max())
    return largest, largest / float(wanted.abs().max())


def published(network: str) -> dict[str, torch.Tensor]:
    """Tensors without memory, with the names and shapes of a published checkpoint."""
    shapes = about(network)["published"]["state_dict"]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
