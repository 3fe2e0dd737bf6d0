"""Weights of frozen networks: read or downloaded as named tensors, never run as code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.files import network_timeout


def hash_tensors(tensors: Mapping[str, Tensor], salt: str = "") -> str:
    """Hex SHA-256 over names, types, shapes and values of tensors, in their order, and a salt."""
    digest = hashlib.sha256(salt.encode())
    for name, tensor in tensors.items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file in safetensors or written by torch.save; nothing in it is executed.

    Raises:
        GraincodeError: there is no such file, or it holds anything but named tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise GraincodeError(f"{path}: no such file; expected the weights of a network")
    try:
        safe = path.suffix == ".safetensors"
        weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise GraincodeError(
            f"{path}: refused, not read ({type(error).__name__}); expected named tensors, as "
            "torch.save(network.state_dict(), path) writes them"
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise GraincodeError(f"{path}: holds {type(weights).__name__}; expected nothing but named tensors")
    return weights


def load_weights(path: str | None, url: str) -> dict[str, Tensor]:
    """The tensors of a file, or of a published one, whose name ends in digits of its SHA-256.

    Args:
        path: of the file; None downloads the published one, once, into torch.hub's cache.
        url: of the published one.
    Raises:
        GraincodeError: it cannot be had, or holds something else.
    """
    if path is not None:
        return read_weights(path)
    try:
        with network_timeout():
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
    except Exception as error:  # no network, a broken download, a damaged file in the hub's cache
        raise GraincodeError(
            f"{url}: cannot be downloaded ({brief(error)}); give the path of {Path(url).name} as weights, or choose "
            "another network"
        ) from None


@contextmanager
def fitting(weights: Mapping[str, Tensor], origin: str, network: str) -> Iterator[None]:
    """Weights that a network does not take are refused, naming their origin and the network."""
    try:
        yield
    except (RuntimeError, ValueError):
        raise GraincodeError(f"{origin}: {len(weights)} tensors that do not fit {network}") from None


def brief(error: Exception) -> str:
    """The first 100 characters of an error, on one line."""
    return " ".join(str(error).split())[:100]
