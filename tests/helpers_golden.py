"""Published networks as their authors' code computes them: outputs in float64, evaluation mode, weights by a formula.

`golden/published/NAME.npz` holds inputs (uint8 images, channels last) and outputs, the reconstruction at every second
row and column; `NAME.json` where the code is, and names and shapes of all weights of the small network that was run and
of the published one. None of the authors' code is needed, or here.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden" / "published"


def tensor(name, shape, scales):
    """The float32 weights that the published network's entry `name` had."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    normal = np.random.RandomState(seed).standard_normal(math.prod(shape)).reshape(shape).astype(np.float32)
    if name in scales:
        return normal * scales[name]
    if name.endswith("running_var"):
        return 1 + 0.1 * abs(normal)
    if name.endswith(("running_mean", "bias")):
        return 0.1 * normal
    if name.endswith("weight") and len(shape) == 1:
        return 1 + 0.1 * normal
    if name.endswith("weight"):
        return normal / math.sqrt(math.prod(shape[1:]))
    if name.endswith("cluster_size_ema"):
        return 1 + abs(normal)
    if name.endswith("attn.mask"):
        return np.tril(np.ones(shape, np.float32))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    raise KeyError(name)


def about(network):
    """What `NAME.json` says: `source`, `small` and `published`, each with `config` and shapes in `state_dict`."""
    return json.loads((FOLDER / f"{network}.json").read_text())


def state_dict(network):
    """The weights of the small network, by their published names."""
    small, ema = about(network)["small"], "quantize.codebook.embed_ema"
    names = [name for name in small["state_dict"] if name != ema]
    found = {name: tensor(name, small["state_dict"][name], small.get("scales", {})) for name in names}
    if ema in small["state_dict"]:
        counts = found["quantize.codebook.cluster_size_ema"]
        found[ema] = found["quantize.codebook.weight"][:-1] * counts[:, None]
    return {name: torch.from_numpy(np.ascontiguousarray(found[name])) for name in small["state_dict"]}


def golden(name):
    """The inputs and outputs in `NAME.npz`: a dict of tensors, integers as long."""
    found = {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items()}
    return {key: value.long() if value.dtype == torch.int16 else value for key, value in found.items()}


def images_of(found, dtype):
    """The (B, 3, H, W) input in [-1, 1] of what `golden` returned."""
    return (found["image"].permute(0, 3, 1, 2).to(dtype) / 127.5 - 1).contiguous()
