"""Means and covariances in .npz files, as the field shares them for ImageNet: read, and written for others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.data.npz import has_images
from graincode.evaluation.statistics import Statistics
from graincode.files import open_npz, replacing
from graincode.networks.features import FeatureNetwork

STATISTICS = frozenset({"mu", "sigma"})
BOTH = "holds images and statistics, of which half would be read; compare with it by evaluation=adm"
"""What is wrong with a file of both kinds where one is expected, and what to do."""

_SPATIAL = "mu_s", "sigma_s"


def read_npz(path: Path | str, network: FeatureNetwork, with_images: bool = False) -> Statistics:
    """Statistics from a file of `mu` and `sigma`, as the field shares them for ImageNet, or as `write_npz` makes it;
    with those of spatial features if the network has such, and the file `mu_s` and `sigma_s`.

    They are taken to be of the network's features; a file by `write_npz` says whether they are. One that holds images,
    too, is refused unless `with_images`.
    """
    path = Path(path).expanduser()
    wanted = ("mu", "sigma", "count", "features", *(_SPATIAL if network.spatial else ()))
    try:
        with open_npz(path) as arrays:
            if not with_images and {*arrays.files} > STATISTICS and has_images(arrays):
                raise GraincodeError(f"{path}: {BOTH}")
            known = {name: arrays[name] for name in arrays.files if name in wanted}
    except GraincodeError:
        raise
    except ValueError as error:
        raise GraincodeError(f"{path}: {error}; give one with arrays mu and sigma") from None
    pooled, spatial = _moments(path, known, ("mu", "sigma"), network, network.dimension), ()
    if known.keys() >= {*_SPATIAL}:
        spatial = _moments(path, known, _SPATIAL, network, network.spatial)
    identity = str(known["features"]) if "features" in known else None
    if identity not in (None, network.identity):
        raise GraincodeError(f"{path}: features of {identity}, not of {network.identity}; use one of them")
    count = known.get("count", np.array(0))
    count = int(count) if count.shape == () and count.dtype.kind in "iu" and count > 0 else None
    none = torch.zeros(0)
    subset = torch.zeros(0, network.dimension), none.long()
    return Statistics(identity, count, *pooled, *subset, none, none, none.long(), *spatial)


def _moments(
    path: Path, known: Mapping[str, np.ndarray], names: tuple[str, str], network: FeatureNetwork, size: int
) -> tuple[Tensor, Tensor]:
    """Arrays of these names as a mean (D,) and a covariance (D, D), float64; refuses what are none."""
    mu, sigma = names

    def demand(holds: bool, problem: str) -> None:
        if not holds:
            raise GraincodeError(f"{path}: {problem}")

    demand({mu, sigma} <= known.keys(), f"no arrays {mu} and {sigma}; give statistics, or images as a folder")
    real = all(known[name].dtype.kind in "fiu" for name in names)
    demand(real, f"{mu} and {sigma} are not real numbers; make it anew")
    mean, covariance = (torch.from_numpy(known[name].astype(np.float64)) for name in names)
    found = f"{mu} of {tuple(mean.shape)} and {sigma} of {tuple(covariance.shape)}"
    fits = mean.shape == (size,) and covariance.shape == (size, size)
    demand(fits, f"{found}, but {network.name} has {size} features; measure in those of the file")
    variance = covariance.trace()  # which is infinite where a square of a number is about to be
    finite = bool(mean.square().sum().isfinite() and covariance.isfinite().all() and variance.square().isfinite())
    symmetric = torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6)
    demand(finite and symmetric, f"NaN or infinite values, or a {sigma} that is not symmetric; make it anew")
    # a covariance kept in float32, or of few images, has negative eigenvalues of this order
    raised = covariance + (1e-6 * variance.clamp(min=0) + 1e-12) * torch.eye(size, dtype=torch.float64)
    is_covariance = int(torch.linalg.cholesky_ex(raised).info) == 0
    demand(is_covariance, f"{sigma} is no covariance, as it has negative eigenvalues; make it anew")
    return mean, covariance


def write_npz(path: Path, statistics: Statistics, **about: str) -> None:
    """Write `mu` and `sigma` as others' tools read them, and `mu_s` and `sigma_s` if spatial features were gathered;
    also `count`, the network as `features`, and more texts."""
    texts = {"features": statistics.identity, "count": statistics.count, **about}
    known = {name: np.array(value) for name, value in texts.items() if value is not None}
    if len(statistics.spatial_mean):
        known |= {"mu_s": statistics.spatial_mean.numpy(), "sigma_s": statistics.spatial_covariance.numpy()}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy(), **known)
