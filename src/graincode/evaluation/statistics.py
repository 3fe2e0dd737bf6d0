"""What metrics need to know of a set of images, gathered in one pass: it is small however many images there are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from graincode.core.errors import GraincodeError, brief, check
from graincode.core.rng import permutation
from graincode.distributed import collectives
from graincode.evaluation.streams import DatasetStream
from graincode.files import cache_root, replacing
from graincode.networks.features import FeatureNetwork
from graincode.networks.weights import hash_tensors

SUBSET = 10_000
"""Images whose single features are kept, for the metrics that compare images one by one."""

_ROWS = 512  # features that are added to a covariance at once

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """A set of N images in the features of a network.

    Attributes:
        identity: of the network, as only statistics of one network are comparable; None if a file does not say.
        count: N; None if a file does not say.
        mean, covariance: (D,) and (D, D) float64, unbiased.
        subset, indices: (M, D) float32 features of M >= 0 of the images, and (M,) long, which ones, ascending.
        class_mass, class_entropy: (S, C) and (S,) float64, sums of class probabilities p and of p log p over the images
            of each split of the Inception score; S is 0 without the score.
        split_sizes: (S,) long, images of each split.
        spatial_mean, spatial_covariance: as `mean` and `covariance`, of the network's spatial features; of length 0
            where they were not asked for.
    """

    identity: str | None
    count: int | None
    mean: Tensor
    covariance: Tensor
    subset: Tensor
    indices: Tensor
    class_mass: Tensor
    class_entropy: Tensor
    split_sizes: Tensor
    spatial_mean: Tensor = field(default_factory=partial(torch.zeros, 0, dtype=torch.float64))
    spatial_covariance: Tensor = field(default_factory=partial(torch.zeros, 0, 0, dtype=torch.float64))

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class Moments:
    """Gathers mean and covariance of rows (N, D), finite ones, without keeping them or sums of their squares.

    Source: Chan, Golub, LeVeque (1979).
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._waiting: list[Tensor] = []
        self._added = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Add (n, D) rows, with any n."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _ROWS:
            self._merge()

    def result(self, count: int) -> tuple[Tensor, Tensor]:
        """(D,) mean and (D, D) unbiased covariance, float64, of the `count` rows of all processes. Collective."""
        self._merge()
        mean = collectives.sum_(self._mean * self._added) / count
        away = self._mean - mean
        return mean, collectives.sum_(self._scatter + self._added * torch.outer(away, away)) / max(count - 1, 1)

    def _merge(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting).double()
        self._waiting = []
        own, total = rows.mean(0), self._added + len(rows)
        centred, away = rows - own, own - self._mean
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(away, away, alpha=self._added * len(rows) / total)
        self._mean += away * (len(rows) / total)
        self._added = total


class Accumulator:
    """Gathers the statistics of a set of images; how they are grouped into batches does not matter.

    Args:
        count: N, images of all processes; each process adds a contiguous part, in the order of processes.
        first: index of this process's first image.
        subset: images whose features are kept, chosen by a fixed permutation of N.
        splits: of the Inception score, by a permutation from the seed; 0 leaves it out.
        spatial: whether to gather the network's spatial features, too.
    """

    def __init__(
        self, network: FeatureNetwork, count: int, first: int = 0, subset: int = SUBSET, splits: int = 0, seed: int = 0,
        spatial: bool = False,
    ) -> None:  # fmt: skip
        check("count", count, "1 image or more", count >= 1)
        check("inception_splits", splits, f"1 to {count}, the number of images", 0 <= splits <= count)
        if splits and not network.classes:
            raise GraincodeError(f"{network.name} has no classifier, so it gives no Inception score")
        self.network, self.count, self.next = network, count, first
        self._waiting: list[Tensor] = []
        self._added, self._broken = 0, 0
        self._moments, self._spatial = Moments(network.dimension), Moments(network.spatial if spatial else 0)
        self._indices = np.sort(permutation(0, 0, count)[:subset])
        # in one piece: many small tensors that stay would keep the memory between them from being used again
        self._subset = torch.zeros(len(self._indices), network.dimension)
        self._split_of = np.empty(count, dtype=np.int64)
        order = np.random.RandomState(seed % 2**32).permutation(count)  # as torch-fidelity shuffles
        self._split_of[order] = ((np.arange(count) + 1) * max(splits, 1) - 1) // count
        self._mass = torch.zeros(splits, network.classes, dtype=torch.float64)
        self._entropy = torch.zeros(splits, dtype=torch.float64)

    def update(self, images: Tensor) -> None:
        """Add the next images of this process's part, uint8 (B, 3, H, W) with any B."""
        images = torch.cat([*self._waiting, images])  # a copy: whoever gave them may use their memory again
        whole = len(images) - len(images) % self.network.batch_size
        for start in range(0, whole, self.network.batch_size):
            self._add(images[start : start + self.network.batch_size])
        self._waiting = [images[whole:]] if whole < len(images) else []

    def result(self) -> Statistics:
        """The statistics of the images of all processes. Collective: call it on all processes."""
        for images in self._waiting:
            self._add(images)
        added, broken = collectives.sum_(torch.tensor([self._added, self._broken])).tolist()
        if broken:
            found = f"{broken} of {self.count} images have NaN or infinite features in {self.network.identity}"
            raise GraincodeError(f"{found}: check its weights")
        check("count", self.count, f"{added}, as many images as came", added == self.count)
        pooled, spatial = self._moments.result(self.count), self._spatial.result(self.count)
        kept = collectives.sum_(self._subset), torch.from_numpy(self._indices)  # rows of other processes are 0
        mass, entropy = collectives.sum_(self._mass), collectives.sum_(self._entropy)
        sizes = torch.from_numpy(np.bincount(self._split_of, minlength=len(entropy)))[: len(entropy)]
        return Statistics(self.network.identity, self.count, *pooled, *kept, mass, entropy, sizes, *spatial)

    def _add(self, images: Tensor) -> None:
        found = self.network(images)
        first, self.next = self.next, self.next + len(images)
        check("count", self.count, f"{self.next} or more, as many images as came", self.next <= self.count)
        self._broken += int((~torch.cat([found.pooled, found.logits, found.spatial], 1).isfinite().all(1)).sum())
        self._added += len(images)
        features = found.pooled.cpu()
        low, high = np.searchsorted(self._indices, (first, self.next))
        self._subset[low:high] = features[self._indices[low:high] - first]
        self._moments.add(features)
        self._spatial.add(found.spatial[:, : self._spatial.dimension].cpu())
        if len(self._entropy):
            log_p = found.logits.cpu().double().log_softmax(1)
            p, split = log_p.exp(), torch.from_numpy(self._split_of[first : self.next])
            self._mass.index_add_(0, split, p)
            self._entropy.index_add_(0, split, (p * log_p).sum(1))


def measure(
    networks: Mapping[str, FeatureNetwork],
    batches: Iterable[Tensor],
    count: int,
    mine: range | None = None,
    splits: int = 0,
    seed: int = 0,
    subset: int = SUBSET,
    progress: str | None = None,
    spatial: bool = False,
) -> dict[str, Statistics]:
    """Statistics in the features of each network, in one pass over the images.

    Args:
        batches: this process's images, as `Accumulator.update` takes them.
        count, mine: images of all processes, and which are this process's; None for all.
        splits, seed, subset, spatial: as of `Accumulator`; networks without a classifier have no splits.
        progress: label of a progress bar, if there is to be one.
    """
    mine = range(count) if mine is None else mine
    gathering = {
        name: Accumulator(net, count, mine.start, subset, splits if net.classes else 0, seed, spatial)
        for name, net in networks.items()
    }
    hidden = progress is None or not collectives.is_main()
    with tqdm(total=len(mine), desc=progress, disable=hidden, unit=" images", leave=False, mininterval=1.0) as bar:
        for images in batches:
            for one in gathering.values():
                one.update(images)
            bar.update(len(images))
    return {name: one.result() for name, one in gathering.items()}


def cached_statistics(
    networks: Mapping[str, FeatureNetwork],
    images: DatasetStream,
    subset: int = SUBSET,
    cache_dir: Path | str | None = None,
    spatial: bool = False,
) -> dict[str, Statistics]:
    """Statistics of real images by network, from `statistics/` of the cache (`cache_root()` by default).

    Those not stored there, under the hash of the images' content and with as large a subset, or with spatial features
    if these are asked for, are gathered and stored.
    """
    folder = (cache_root() if cache_dir is None else Path(cache_dir).expanduser()) / "statistics"
    content, paths, found, missing = images.dataset.content_hash(), {}, {}, {}
    for name, network in networks.items():
        paths[name] = folder / f"{network.name}-{network.weights_hash[:12]}-{content[:16]}.safetensors"
        found[name] = _read(paths[name], network, content, subset, network.spatial if spatial else 0)
        # gathering is work for all processes: they must agree on what is needed
        if collectives.sum_(torch.tensor([int(found[name] is None)])):
            missing[name] = network
    if missing:
        found |= measure(
            missing, images, images.count, images.mine, subset=subset, progress=images.name, spatial=spatial
        )
        for name, network in missing.items():
            collectives.on_main(partial(_write, paths[name], found[name], network, content))
    return found


def _header(network: FeatureNetwork, content: str, tensors: Mapping[str, Tensor], count: str) -> dict[str, str]:
    return {"weights": network.weights_hash, "content": content, "tensors": hash_tensors(tensors), "count": count}


def _read(path: Path, network: FeatureNetwork, content: str, subset: int, spatial: int) -> Statistics | None:
    """What `_write` stored, with no more features than asked for; None if there is none, damaged, or with fewer."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if header != (expected := _header(network, content, tensors, header["count"])):
            raise ValueError(f"{header}, expected {expected}")
        found = Statistics(network.identity, int(header["count"]), **tensors)
    except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        _logger.warning("%s is damaged (%s): computing it again", path, error)
        return None
    if len(found.subset) < min(subset, found.count) or len(found.spatial_mean) < spatial:
        return None
    # subsets of one set are parts of each other
    kept = torch.from_numpy(np.isin(found.indices.numpy(), permutation(0, 0, found.count)[:subset]))
    return replace(found, subset=found.subset[kept], indices=found.indices[kept])


def _write(path: Path, statistics: Statistics, network: FeatureNetwork, content: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in sorted(statistics.tensors().items())}
    try:
        with replacing(path) as unfinished:
            # not by save_file, which has a temporary name of its own
            unfinished.write_bytes(save(tensors, _header(network, content, tensors, str(statistics.count))))
    except OSError as error:  # it only saves time
        advice = "they are measured again next time; make room there, or set GRAINCODE_CACHE to another folder"
        _logger.warning("%s cannot keep these statistics (%s): %s", path.parent, brief(error), advice)
