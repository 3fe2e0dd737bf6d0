"""Do the metrics obey the laws that metrics must obey, and what do they cost?

    .venv/bin/python experiments/evaluation/run.py [laws] [costs] [memory]

Laws: Fréchet and kernel distances of Fashion-MNIST's test images (2,000 of them, lite0@112) to themselves, to as many
training images, and to copies that are blurred, noisy or compressed ever more. Costs: seconds per 1,000 images for
features and for the statistics beside them, seconds of each metric, and peak memory for 12,000
and 60,000 images (at 32 px, which is quicker and keeps as much).
Writes results.json, results.md and laws.png beside this file.
Cost: 10 minutes of two CPU cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

sys.path.insert(0, str(Path(__file__).parents[1]))
from sweep import compressed, noisy

from graincode.core.images import to_uint8
from graincode.data import FashionMNIST, Subset
from graincode.evaluation.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from graincode.evaluation.statistics import Statistics, measure
from graincode.files import write_json
from graincode.networks.features import Lite0Features

HERE = Path(__file__).parent
COUNT = 2000
BLURS, NOISES, QUALITIES = (0.5, 0.75, 1, 1.5, 2), (4, 8, 16, 32, 64), (90, 70, 50, 30, 10)
MEMORY = (12_000, 60_000)


def images_of(split: str, count: int) -> Tensor:
    """(N, 3, 32, 32) uint8, of a fixed permutation of a split."""
    dataset = Subset(FashionMNIST().split(split), count)
    return to_uint8(dataset[range(len(dataset))].images)


def statistics_of(images: Tensor, resolution: int = 112, splits: int = 0) -> Statistics:
    """In the features of EfficientNet-Lite0."""
    network = {"lite0": Lite0Features(resolution)}
    return measure(network, images.split(250), len(images), splits=splits)["lite0"]


def laws() -> dict[str, list[dict[str, float]]]:
    """Distances to the test images, by what was done to them."""
    clean = images_of("test", COUNT)
    reference = statistics_of(clean)
    trace = float(reference.covariance.trace())
    series: dict[str, list[tuple[float, Tensor]]] = {
        "itself": [(0, clean)],
        "training images": [(0, images_of("train", COUNT))],
        "Gaussian blur, sigma in pixels": [(s, gaussian_blur(clean, 13, s)) for s in BLURS],
        "white noise, standard deviation of 255": [(s, noisy(clean, s)) for s in NOISES],
        "JPEG, quality": [(q, compressed(clean, q)) for q in QUALITIES],
    }
    found: dict[str, list[dict[str, float]]] = {}
    for name, changed in series.items():
        found[name] = []
        for amount, images in changed:
            made = statistics_of(images)
            distance, kernel = frechet_distance(made, reference), kernel_distance(made, reference)
            row = {"amount": amount, "fd": distance.value, "fd_of_trace": distance.value / trace}
            found[name].append(row | {"kid": kernel.value, "kid_std": kernel.std})
    return found


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Timed(Lite0Features):
    """Adds up the seconds that it takes."""

    seconds = 0.0

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        found = super().__call__(images)
        self.seconds += time.perf_counter() - began
        return found


def costs() -> dict[str, dict[str, float]]:
    """Seconds per 1,000 images, and of each metric."""
    images, found = images_of("test", 1000), {}
    for resolution in (112, 224):
        network = Timed(resolution)
        network(images[:32])
        network.seconds = 0.0
        everything = seconds_of(lambda network=network: measure({"it": network}, [images], len(images), splits=10))
        found[f"{resolution} px"] = {"features": network.seconds, "statistics": everything - network.seconds}
    made, real = (statistics_of(images_of(split, 10_000), 112, 10) for split in ("train", "test"))
    found["10,000 against 10,000 images, 112 px"] = {
        "fd": seconds_of(lambda: frechet_distance(made, real)),
        "is": seconds_of(lambda: inception_score(made)),
        "kid": seconds_of(lambda: kernel_distance(made, real)),
        "precision and recall": seconds_of(lambda: precision_recall(made, real)),
        "density and coverage": seconds_of(lambda: density_coverage(made, real)),
    }
    return found


def peak_mib() -> float:
    """Of this process so far (Linux)."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def peak_memory(count: int) -> dict[str, float]:
    """FD and IS of so many images that are made as they go, in a process of its own."""
    base = images_of("test", 1000)

    def stream() -> Iterator[Tensor]:
        for start in range(0, count, 250):
            yield base[torch.arange(start, start + 250) % 1000]

    began = time.perf_counter()
    made = measure({"lite0": Lite0Features(32)}, stream(), count, splits=10)["lite0"]
    frechet_distance(made, made)
    inception_score(made)
    return {"peak MiB": peak_mib(), "seconds": time.perf_counter() - began}


def memory() -> dict[str, dict[str, float]]:
    """Of the numbers of images in MEMORY."""
    found = {}
    for count in MEMORY:
        done = subprocess.run([sys.executable, __file__, str(count)], capture_output=True, text=True, check=True)
        found[str(count)] = json.loads(done.stdout.splitlines()[-1])
    return found


def plot(found: dict[str, list[dict[str, float]]]) -> None:
    """The distances, a panel for each kind of change."""
    canvas = Canvas(figsize=(12, 3.6), layout="constrained")
    kinds = list(found)[2:]
    floor = found["training images"][0]["fd"]
    for panel, name in zip(canvas.subplots(1, len(kinds)), kinds, strict=True):
        panel.plot([row["amount"] for row in found[name]], [row["fd"] for row in found[name]], "o-", color="#1b6ca8")
        panel.axhline(floor, color="#777777", linestyle="--", linewidth=1)
        panel.annotate("as many training images", (0.97, floor), xycoords=("axes fraction", "data"), ha="right",
                       va="bottom", fontsize=8, color="#555555")  # fmt: skip
        panel.set_xlabel(name)
        panel.set_ylim(bottom=0)
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        if name.startswith("JPEG"):
            panel.invert_xaxis()
    canvas.axes[0].set_ylabel("FD (lite0@112) to 2,000 test images")
    canvas.savefig(HERE / "laws.png", dpi=120)


def main() -> None:
    """Run the parts that are asked for (all by default), and write the record of all."""
    if sys.argv[1:] and sys.argv[1].isdecimal():
        print(json.dumps(peak_memory(int(sys.argv[1]))))
        return
    parts = {"laws": laws, "costs": costs, "memory": memory}
    record = HERE / "results.json"
    results = json.loads(record.read_bytes()) if record.is_file() else {}
    for name in sys.argv[1:] or parts:
        results[name] = parts[name]()
        write_json(record, results)
    plot(results["laws"])
    lines = ["| images against 2,000 test images | amount | FD (lite0@112) | of the trace | KID (lite0@112) |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, rows in results["laws"].items():
        for row in rows:
            distance = f"{row['fd']:.4g} | {row['fd_of_trace']:.2g}"
            lines.append(f"| {name} | {row['amount']:g} | {distance} | {row['kid']:.3g} ± {row['kid_std']:.1g} |")
    lines += ["", "| seconds on two CPU cores | |", "|---|---|"]
    for what, costs_of in results["costs"].items():
        unit = ", per 1,000 images" if what.endswith("px") and "against" not in what else ""
        lines += [f"| {what}: {part}{unit} | {seconds:.2f} |" for part, seconds in costs_of.items()]
    lines += ["", "| images, FD and IS at 32 px | peak memory of the process | seconds |", "|---|---|---|"]
    for count, row in results["memory"].items():
        lines.append(f"| {int(count):,} | {row['peak MiB']:.0f} MiB | {row['seconds']:.0f} |")
    (HERE / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
