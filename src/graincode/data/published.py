"""What data sets share that are published as a few files: fetching them once, and a validation split for all time."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from graincode.core.errors import GraincodeError
from graincode.core.rng import permutation
from graincode.files import NETWORK_TIMEOUT_SECONDS

_SPLIT_KEY = 0xFA5410
_COMMAND_TIMEOUT_SECONDS = 600

_logger = logging.getLogger(__name__)


def validation_mask(count: int, one_in: int) -> Tensor:
    """Which training images are for validation: the same in every run and on every machine.

    Args:
        count: number of training images in the files.
        one_in: how many images there are for each one of validation.
    Returns:
        (count,) bool with count // one_in true: those with the smallest of the random 64-bit numbers that Philox
        draws under a fixed key, a stream that does not change with numpy's version.
    """
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.from_numpy(permutation(_SPLIT_KEY, 0, count)[: count // one_in])] = True
    return mask


def first_complete(title: str, folders: Iterable[Path], is_complete: Callable[[Path], bool]) -> Path | None:
    """The first of the folders that has all files of the data set, or None."""
    for folder in folders:
        if is_complete(folder):
            _logger.info("%s is read from %s", title, folder)
            return folder
    return None


def fetch(
    title: str, cache: Path, ways: Mapping[str, Callable[[Path], Path]], find: Callable[[Path], list[Path]]
) -> bool:
    """Fetch a data set into the cache by the first way that works; whether there was one.

    Args:
        title: name of the data set.
        cache: directory that will hold its files, in the sub-directories that they are fetched in.
        ways: of each, what to call it, and a function that fetches into a scratch directory and gives the directory
            that the files are in.
        find: all the files in a directory; raises an OSError if some are missing.
    """
    for way, fetch_into in ways.items():
        _logger.info("%s is not on this computer: trying %s", title, way)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # a temporary directory, from which whole files are moved, so that other processes never see half of one
            with tempfile.TemporaryDirectory(dir=cache, prefix="fetching-") as scratch:
                folder = fetch_into(Path(scratch))
                for file in find(folder):
                    target = cache / file.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            _logger.info("%s: %s failed: %s", title, way, " ".join(reason.split()))
        else:
            _logger.info("%s was fetched into %s by %s", title, cache, way)
            return True
    return False


def unpack_debian_package(package: str, scratch: Path) -> Path:
    """Download a Debian package and unpack it without installing it, which needs no rights.

    Args:
        package: its name.
        scratch: an empty directory.
    Returns:
        The directory that holds its files as / would.
    Raises:
        OSError, subprocess.SubprocessError: there is no apt-get here, or it fails, or takes more than 10 minutes.
    """

    def run(*command: str) -> None:
        subprocess.run(
            command, cwd=scratch, check=True, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_SECONDS
        )

    apt = ("apt-get", "-q", "-o", f"Acquire::http::Timeout={NETWORK_TIMEOUT_SECONDS}")
    try:
        run(*apt, "download", package)
    except subprocess.CalledProcessError:
        if os.geteuid() != 0:
            raise
        run(*apt, "update")  # fresh containers have no package lists, and only root can fetch them
        run(*apt, "download", package)
    for file in scratch.glob("*.deb"):
        run("dpkg-deb", "-x", file.name, ".")
    return scratch


def corrupt(path: Path, reason: str, kind: str) -> GraincodeError:
    """What to say of a damaged file of a data set whose files are of the given kind."""
    return GraincodeError(
        f"{path} is corrupt ({reason}): remove it, so that it is fetched again if it was fetched, "
        f"or type data.root=/folder/of/intact/{kind}"
    )
