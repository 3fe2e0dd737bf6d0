"""Weights of frozen networks: read or downloaded as named tensors, never run as code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from graincode.core.errors import GraincodeError, brief
from graincode.files import network_timeout


def hash_tensors(tensors: Mapping[str, Tensor], salt: str = "") -> str:
    """Hex SHA-256 over names, types, shapes and values of tensors, in their order, and a salt."""
    digest = hashlib.sha256(salt.encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file in safetensors or by torch.save; nothing else is taken, and nothing executed."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise GraincodeError(f"{path}: no such file; expected the weights of a network")
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        found = type(error).__name__
        raise GraincodeError(f"{path}: refused ({found}); expected torch.save(network.state_dict(), path)") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise GraincodeError(f"{path}: holds {type(weights).__name__}; expected nothing but named tensors")
    return weights


def load_weights(path: str | None, url: str) -> dict[str, Tensor]:
    """The tensors of a file, or, without a path, of a published one, downloaded once into torch.hub's cache; its name
    ends in digits of its SHA-256, which is checked."""
    if path is not None:
        return read_weights(path)
    try:
        with network_timeout():
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except Exception as error:  # no network, a broken download, a damaged file in the hub's cache
        advice = f"expected the path of {Path(url).name}, or another network"
        raise GraincodeError(f"weights=null: {url} cannot be downloaded ({brief(error)}); {advice}") from None


@contextmanager
def fitting(weights: Mapping[str, Tensor], origin: str, network: str) -> Iterator[None]:
    """In the block, an error of loading becomes one that names the origin of the weights and the network."""
    try:
        yield
    except (RuntimeError, ValueError):
        raise GraincodeError(f"{origin}: {len(weights)} tensors that do not fit {network}") from None
