"""Streamed statistics against torch-fidelity's own pass over the same images."""

from __future__ import annotations

import contextlib
import io
import warnings

import torch
from timing import Result, paired
from torch.utils.data import TensorDataset
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from graincode.evaluation.metrics import frechet_distance, inception_score
from graincode.evaluation.statistics import measure
from graincode.networks.features import Lite0Features, open_lite0

COUNT = 512


class Pictures(TensorDataset):
    """Images one by one, as torch-fidelity takes them."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index)[0]


class Lite0Extractor(FeatureExtractorBase):
    """The same network as torch-fidelity takes it."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.network, _ = open_lite0(112)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = dict(zip(("1280", "logits"), self.network(images), strict=True))
        return tuple(outputs[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "1280", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "1280"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


def metrics() -> Result:
    """FD and IS of 512 images of 64 px against 512 others, in lite0@112, networks loaded each time."""
    register_feature_extractor("lite0@112", Lite0Extractor)
    torch.manual_seed(0)
    sets = [torch.randint(0, 256, (COUNT, 3, 64, 64), dtype=torch.uint8) for _ in range(2)]

    def ours() -> None:
        network = {"lite0": Lite0Features(112)}
        made, real = (measure(network, images.split(64), COUNT, splits=10)["lite0"] for images in sets)
        frechet_distance(made, real)
        inception_score(made)

    def reference() -> None:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calculate_metrics(
                input1=Pictures(sets[0]), input2=Pictures(sets[1]), feature_extractor="lite0@112", fid=True, isc=True,
                batch_size=32, cuda=False, cache=False, verbose=False, num_workers=0,
            )  # fmt: skip

    seconds, ratio = paired(ours, reference, 3)
    return Result("FD and IS", 2 * COUNT / seconds, "images/s", "torch-fidelity with the same network", ratio, "")
