"""The image files below a directory: what counts, which links are followed, and what is left out."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from graincode.core.errors import GraincodeError
from graincode.data.decoding import EXTENSIONS
from graincode.data.encoded import Files, readable

JUNK = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"))
OUTSIDE, _TWICE = "links that lead out of it (allow_outside=true takes them)", "links to folders that are read already"
_HIDDEN, _ENDING, _SPECIAL = "hidden files or folders", "files with other endings", "pipes, devices or broken links"

_logger = logging.getLogger(__name__)


@dataclass
class LeftOut:
    """What is left out: how many things for each reason, and one of them."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, why: str, name: str) -> None:
        """Count one more."""
        self.counts[why] += 1
        self.examples[why] = min(name, self.examples.get(why, name))

    def __str__(self) -> str:
        return "; ".join(f"{self.counts[why]} {why}, such as {name!r}" for why, name in sorted(self.examples.items()))


def image_files(base: Path, root: Path | None = None, allow_outside: bool = False) -> Files:
    """The images below a directory, sorted by their paths; refuses one without images, and one that cannot be read.

    Regular files with one of the `EXTENSIONS` count, each directory once. What is hidden or in `JUNK` does not. One
    line of the log says what is left out.

    Args:
        root: what links may not lead out of, by default the directory itself.
        allow_outside: whether they may.
    """
    scan = _Scan(base, root or base, allow_outside)
    left = scan.left_out
    if not scan.paths:
        found = f"; left out {left}" if left.counts else ""
        raise GraincodeError(f"{base}: expected images in it, files that end in {' '.join(EXTENSIONS)}{found}")
    if left.counts:
        level = logging.WARNING if left.counts.keys() - {_HIDDEN, _ENDING} else logging.INFO
        _logger.log(level, "%s: left out %s", base, left)
    return Files(base, sorted(scan.paths))


def leads_outside(path: str | Path, *roots: str | Path) -> bool:
    """Whether what a path stands for, its links followed, lies in none of some directories."""
    real = os.path.realpath(path)
    return not any(os.path.commonpath((real, inside)) == inside for inside in map(os.path.realpath, roots))


class _Scan:
    """A walk through a directory and, behind it, the directories that links lead to."""

    def __init__(self, base: Path, root: Path, allow_outside: bool) -> None:
        self.paths: list[str] = []
        self.left_out = LeftOut()
        self._seen: set[str] = set()
        self._links: list[tuple[str, str]] = []
        self._may_follow = lambda path: allow_outside or not leads_outside(path, root)
        if not self._may_follow(base):
            raise GraincodeError(f"{base} leads out of {root}: move it there, or give allow_outside=true")
        self._walk(os.path.realpath(base), "")
        while self._links:
            self._links.sort()
            path, folder = self._links.pop(0)
            self.left_out.add(_TWICE, path) if folder in self._seen else self._walk(folder, f"{path}/")

    def _walk(self, top: str, prefix: str) -> None:
        """A real directory and those below it, whose paths begin with a prefix."""
        waiting = [(top, prefix)]
        while waiting:
            folder, prefix = waiting.pop()
            if folder in self._seen:
                continue
            self._seen.add(folder)
            with readable(Path(folder)), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False) and not is_hidden(entry.name):
                        waiting.append((entry.path, f"{prefix}{entry.name}/"))
                    else:
                        self._take(entry, prefix + entry.name)

    def _take(self, entry: os.DirEntry[str], path: str) -> None:
        if is_hidden(entry.name):
            return self.left_out.add(_HIDDEN, path)
        is_image, is_link = entry.name.lower().endswith(EXTENSIONS), entry.is_symlink()
        is_folder = is_link and os.path.isdir(entry.path)
        if not is_image and not is_folder:
            return self.left_out.add(_ENDING, path)
        if is_link and not self._may_follow(entry.path):
            return self.left_out.add(OUTSIDE, path)
        if is_folder:
            self._links.append((path, os.path.realpath(entry.path)))
        elif os.path.isfile(entry.path) if is_link else entry.is_file():
            self.paths.append(path)
        else:
            self.left_out.add(_SPECIAL, path)


def is_hidden(name: str) -> bool:
    """Whether a name is passed over: it begins with a dot, or a system or program put it there."""
    return name.startswith(".") or name in JUNK
