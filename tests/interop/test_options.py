"""What an import refuses: options without use, tables that cannot be right, tensors that only look right."""

import pytest
import torch
from helpers_parity import NETWORKS, write_golden

from graincode.core.errors import GraincodeError
from graincode.interop.convert import import_tokenizer
from graincode.interop.names import Options


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_golden("dqvae_dual_entropy", tmp_path_factory.mktemp("dqvae") / "last.ckpt")


def refusal(path, options=None, family="dqvae"):
    with pytest.raises(GraincodeError) as caught:
        import_tokenizer(family, path, options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(file, tmp_path, change):
    tensors = torch.load(file, weights_only=True)["state_dict"]
    change(tensors)
    torch.save({"state_dict": tensors}, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


@pytest.mark.parametrize(
    "text",
    [
        '{"definition": [1], "1": 0.1, "99": 2}',
        '{"definition": null, "1": 0.1, "99": 2}',
        '{"1": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"1": 0.1, "99": Infinity}',
        '{"1": -Infinity, "99": 2}',
        '{"1": 0.1, "50": NaN, "99": 2}',
        '{"1": 0.1, "NaN": 1, "99": 2}',
        '{"1": 0.1, "99": 1' + "0" * 400 + "}",
        '{"1": -0.1, "99": 2}',
        '{"1": 0.1, "99": 3.5}',
    ],
    ids=range(10),
)
def test_a_table_that_cannot_be_right_is_refused(file, tmp_path, text):
    table = tmp_path / "table.json"
    table.write_text(text)
    assert f"{table}: no percentiles" in refusal(file, Options(thresholds=table))


def test_a_table_may_end_at_the_largest_entropy(file, tmp_path):
    table = tmp_path / "table.json"
    table.write_text('{"0": 0, "100": 3.4657359123}')  # log(32) in float32
    import_tokenizer("dqvae", file, Options(thresholds=table))


@pytest.mark.parametrize("network", ["vqgan_f16", "dqvae_dual_feature"])
def test_options_of_the_entropy_router_are_refused_without_one(network, tmp_path):
    path = write_golden(network, tmp_path / "last.ckpt")
    for name, options in {"thresholds": Options(thresholds=path), "entropy": Options(entropy="current")}.items():
        found = refusal(path, options, NETWORKS[network])
        assert f"{name}=" in found
        assert "for a network without entropy router" in found


def test_the_current_entropy_needs_a_table(file):
    found = refusal(file, Options(entropy="current"))
    assert "thresholds=None: expected a table of the current definition" in found


def test_an_encoder_without_width_is_refused(file, tmp_path):
    def empty(tensors):
        for name in tensors:
            if name.startswith("encoder.down.") and name.endswith(".block.0.conv1.weight"):
                tensors[name] = tensors[name][:0]

    assert "no weights of dqvae" in refusal(changed(file, tmp_path, empty))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_weights_are_real_numbers(file, tmp_path, dtype):
    name = "decoder.conv_out.bias"
    found = refusal(changed(file, tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)})))
    assert f"{name} [3] {str(dtype).removeprefix('torch.')} instead of [3] float32" in found


def test_query_key_and_value_have_one_shape_each(file, tmp_path):
    def shift(tensors):
        query = next(name for name in tensors if name.endswith(".q.weight"))
        key = query.replace(".q.", ".k.")
        tensors[query], tensors[key] = torch.cat([tensors[query], tensors[key][:1]]), tensors[key][1:]

    assert "2 of other shapes" in refusal(changed(file, tmp_path, shift))


@pytest.mark.parametrize("side", ["encoder.down", "decoder.up"])
def test_a_first_level_that_is_missing_is_named(file, tmp_path, side):
    name = f"{side}.0.block.0.conv1.weight"
    assert f"{name} is missing" in refusal(changed(file, tmp_path, lambda tensors: tensors.pop(name)))
