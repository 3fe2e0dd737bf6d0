"""Puts Fashion-MNIST where `data=fashion_mnist` finds it, from Debian's package dataset-fashion-mnist.

    .venv/bin/python experiments/data/fashion_mnist.py

The four files go to $GRAINCODE_CACHE/fashion-mnist, by default ~/.cache/graincode/fashion-mnist. Nothing is done where
they are there or the package is installed, and nothing fails on a computer without apt-get: there the data set itself
downloads them from its publisher. Cost: 30 MB, seconds.
"""

from __future__ import annotations

import os
import sys

import debian

from graincode.data import FashionMNIST
from graincode.files import scratch_directory

PACKAGE = "dataset-fashion-mnist"


def main() -> None:
    """Console entry."""
    cache = FashionMNIST.cache()
    for folder in (*FashionMNIST.installed, cache):
        if len(FashionMNIST.found(folder)) == len(FashionMNIST.files):
            return
    cache.mkdir(parents=True, exist_ok=True)
    # a temporary directory, from which whole files are moved, so that other processes never see half of one
    with scratch_directory(cache, "fetching") as scratch:
        try:
            unpacked = debian.unpack(PACKAGE, scratch)
        except SystemExit as error:
            print(f"{error}\ndata=fashion_mnist will try its publisher", file=sys.stderr)
            return
        for path in FashionMNIST.found(unpacked / FashionMNIST.installed[0].relative_to("/")).values():
            os.replace(path, cache / path.name)
    print(f"{PACKAGE} was unpacked into {cache}")


if __name__ == "__main__":
    main()
