"""Folders of a VQModel of diffusers, against diffusers itself where it is installed."""

import json

import pytest
import torch
from helpers_golden import about, state_dict
from helpers_parity import differences, write_golden
from safetensors.torch import save_file

from graincode.core.errors import GraincodeError
from graincode.interop.convert import import_tokenizer
from graincode.interop.names import Options

NETWORK = "diffusers_vqmodel"
PLAIN = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}


@pytest.fixture
def folder(tmp_path):
    return write_golden(NETWORK, tmp_path / "model")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    "changes", [{}, {**PLAIN, "mid_block_add_attention": False}, {**PLAIN, "layers_per_block": 1, "vq_embed_dim": None}]
)
@pytest.mark.slow
def test_a_folder_that_diffusers_saves_computes_what_it_does(changes, tmp_path):
    library = pytest.importorskip("diffusers")
    model = library.VQModel.from_config({**about(NETWORK)["small"]["config"], **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.6 if "embedding" in name else 0.1 if parameter.ndim == 1 else 0.0
            parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(tmp_path / "model", max_shard_size="1MB")
    module, model = import_tokenizer("diffusers", tmp_path / "model", Options(32)).module.double(), model.double()
    images = torch.rand(2, 3, 32, 32).double() * 2 - 1
    with torch.no_grad():
        latent = model.encode(images).latents
        indices = model.quantize(latent)[2][2].view(2, 8, 8)
        features, codes, whole = module.encoder(images)[0], module.tokenize(images), module(images)
        own = module.project_in(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(own, latent, rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.images, model.decode(latent).sample, rtol=0, atol=1e-9)
    assert torch.equal(codes.indices, indices)
    assert len(indices.unique()) > 4


def test_attention_by_its_older_names_is_known(folder):
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = state_dict(NETWORK)
    for new, old in older.items():
        tensors = {name.replace(new, old): value for name, value in tensors.items()}
    assert any(".query.weight" in name for name in tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    found = differences(import_tokenizer("diffusers", folder, Options(32)).module, NETWORK, torch.float64)
    assert max(absolute for absolute, _ in found.values()) < 1e-9


@pytest.mark.when("a VQModel of diffusers has settings that no network here has", "they are named")
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"act_fn": "relu"}, "act_fn=relu"),
        ({"norm_type": "spatial", "norm_num_groups": 16}, "norm_type=spatial, norm_num_groups=16"),
        ({"_class_name": "AutoencoderKL"}, "a VQModel"),
        ({"mid_block_add_attention": False}, "20 unknown (decoder.mid_block.attentions.0."),
    ],
)
def test_what_no_network_here_has_is_named(folder, changes, part):
    with pytest.raises(GraincodeError) as error:
        import_tokenizer("diffusers", edit(folder, **changes))
    assert part in str(error.value)


def test_the_configuration_is_needed_and_counts(folder):
    files = import_tokenizer("diffusers", folder, Options(32)).origin["files"]
    assert set(files) == {"config.json", "diffusion_pytorch_model.safetensors"}
    (folder / "config.json").write_text("{")
    with pytest.raises(GraincodeError, match=r"config\.json: damaged"):
        import_tokenizer("diffusers", folder)
    (folder / "config.json").unlink()
    with pytest.raises(GraincodeError, match=r"expected config\.json of a VQModel"):
        import_tokenizer("diffusers", folder)
