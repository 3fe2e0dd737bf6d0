"""The two ways to measure, which cannot be mixed: what is compared with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graincode.metrics.features import FeatureNetwork


@dataclass(frozen=True)
class Generation:
    """Samples against a split, `evaluation=generation`.

    Attributes:
        features: the network that images are measured with.
        split: the reference.
        num_samples: None for as many as the reference has images.
        class_images: real training images behind the class consistency; 0 leaves it out.
        inception_splits: parts of the Inception score; None for 10, or fewer if there are fewer images.
    """

    features: FeatureNetwork
    split: Literal["train", "val", "test"] = "test"
    num_samples: int | None = None
    class_images: int = 10000
    inception_splits: int | None = None


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructions against the images that they were made from, `evaluation=reconstruction`.

    Attributes:
        features, split, inception_splits: as in `Generation`.
        ratios: share of regions at each grain; None for the tokenizer's own.
    """

    features: FeatureNetwork
    split: Literal["train", "val", "test"] = "test"
    ratios: Sequence[float] | None = None
    inception_splits: int | None = None
