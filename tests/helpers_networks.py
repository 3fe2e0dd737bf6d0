"""What tests of frozen networks share."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from graincode.networks.features import FeatureNetwork


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def numbers(*shape: int, start: int = 0) -> Tensor:
    """Numbers in [-0.5, 0.5) that look random and are the same on every machine and version of torch."""
    place = torch.arange(start, start + math.prod(shape), dtype=torch.float64)
    return ((place * 12.9898).sin() * 43758.5453).frac().abs().sub(0.5).float().view(shape)


def write_vgg16(path: Path) -> Path:
    """A file of the convolutions of a VGG16 as torchvision names them, with `numbers` for weights."""
    widths, tensors = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512], {}
    for index, place in enumerate((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)):
        fan = 9 * widths[index]
        tensors[f"features.{place}.weight"] = numbers(widths[index + 1], widths[index], 3, 3) * (24 / fan) ** 0.5
        tensors[f"features.{place}.bias"] = 0.1 * numbers(widths[index + 1], start=index)
    torch.save(tensors, path)
    return path


def in_torch_fidelity(network: FeatureNetwork) -> str:
    """Register a network as torch-fidelity's `feature_extractor`; gives the name to call it by."""

    class Extractor(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)

        def forward(self, input: Tensor) -> tuple[Tensor, ...]:
            found = dict(zip(("features", "logits"), network(input)[:2], strict=True))
            return tuple(found[name] for name in self.features_list)

        @classmethod
        def get_provided_features_list(cls) -> tuple[str, ...]:
            return "features", "logits"

        @classmethod
        def get_default_feature_layer_for_metric(cls, metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    if network.name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(network.name, Extractor)
    return network.name
