"""Benchmarks: each times two things in one run, in turn, and reports their ratio.

    make bench                    all of them; prints a table and writes runs/bench.json
    make bench ARGS="-k sampler"  those whose name contains "sampler"

A ratio above 1 means that graincode is faster than its reference. One thread, unless --threads says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import batching
import torch
from codes import sequences
from contention import beside_another
from density import SIGMAS, entropy_memory, entropy_time
from engine import cached_loader, data_wait, engine_overhead
from evaluation import metrics
from launches import decoding, masked, training
from masked import masked_floor, variable_length
from padding import WINDOWS, padding
from quantizer import against_library, against_product
from sampler import cached_sampler, sampler_and_gpt, sampler_floor, training_step
from step import step_shares
from timing import Result
from waits import GOALS, host_waits

from graincode.files import write_json
from graincode.generator import DGiTAR, DGiTNAR


def benchmarks() -> Iterator[tuple[str, Callable[[], Result]]]:
    """All benchmarks by name."""
    yield "sequences", sequences
    yield "sampler", cached_sampler
    yield "sampler floor", sampler_floor
    yield "sampler gpt", sampler_and_gpt
    yield "sampler training", training_step
    yield "continuous batching 32", batching.equal_length
    yield "continuous batching 64", batching.finest
    yield "masked", masked_floor
    yield "masked lengths", variable_length
    yield "launches gpt", partial(decoding, "gpt", 200)
    yield "launches modern", partial(decoding, "modern", 300)
    yield "launches training", partial(training, DGiTAR)
    yield "launches training masked", partial(training, DGiTNAR)
    yield "launches masked", masked
    yield "quantizer", against_library
    yield "quantizer product", against_product
    yield "engine", engine_overhead
    yield "loader", cached_loader
    yield "wait", data_wait
    yield "step", step_shares
    yield from ((f"waits-{kind}", partial(host_waits, kind)) for kind in GOALS)
    yield "evaluation", metrics
    yield from ((f"beside-{busy}", partial(beside_another, busy)) for busy in ("nothing", "loop", "training"))
    yield from ((f"entropy-{sigma}", partial(entropy_time, sigma)) for sigma in SIGMAS)
    yield "entropy-memory", entropy_memory
    yield from ((f"padding-{window}", partial(padding, window)) for window in WINDOWS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", default="", metavar="NAME", help="only benchmarks whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [(name, run) for name, run in benchmarks() if options.k in name]
    if not chosen:
        parser.error(f"no benchmark has {options.k!r} in its name: type one of {[name for name, _ in benchmarks()]}")
    results = []
    for name, run in chosen:
        print(f"{name} ...", end="", flush=True)
        results.append(run())
        print("\r", end="")
    print(f"{'name':<24}{'value':>12} {'unit':<16}{'ratio':>9}  {'goal':<8}  reference")
    for r in results:
        print(f"{r.name:<24}{r.value:>12.4g} {r.unit:<16}{r.ratio:>9.2f}  {r.goal:<8}  {r.reference}")
    write_json(options.out, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
