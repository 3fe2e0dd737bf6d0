"""Weights that others trained to an export. `graincode-import --help` shows how."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from graincode.core.errors import GraincodeError, one_line
from graincode.interop import FAMILIES


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line. Exit statuses: 0; 2 and one line on standard error for bad input."""
    families = "\n".join(f"  {name:<10} {what}" for name, what in FAMILIES.items())
    parser = argparse.ArgumentParser(
        "graincode-import", description="Make a published tokenizer an export, which all jobs take as their own.",
        epilog=f"families:\n{families}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("family", choices=FAMILIES, metavar="FAMILY", help="one of those below")
    parser.add_argument("file", type=Path, metavar="FILE", help="the weights: a file, or a folder of safetensors")
    parser.add_argument("-o", "--export", type=Path, help="where the export goes (default: imported/NAME OF FILE)")
    parser.add_argument("--image-size", type=int, help="height and width of images (default: 256, or the file's)")
    either = argparse.BooleanOptionalAction
    parser.add_argument("--ema", action=either, help="moving averages of the weights, or not (default: if there)")
    parser.add_argument("--thresholds", type=Path, help="dqvae, entropy router: percentiles in JSON (else ImageNet's)")
    definitions = {"choices": ["older", "current"], "default": "older"}
    parser.add_argument(
        "--entropy", **definitions, help="dqvae: before July 2023 (default) or since (needs --thresholds)"
    )
    parser.error = _refuse  # type: ignore[method-assign]
    given = parser.parse_args(arguments)

    from graincode.interop.convert import import_tokenizer
    from graincode.interop.names import Options

    try:
        name = given.file.absolute().name.replace(".safetensors.index.json", ".json")
        path = given.export or Path("imported") / (name if given.file.is_dir() else Path(name).stem)
        if path.exists():
            raise GraincodeError(f"{path} is there already: move it away, or give another name by -o")
        options = Options(given.image_size, given.ema, given.thresholds, given.entropy)
        found = import_tokenizer(given.family, given.file, options)
        identity = found.save(path)
    except GraincodeError as error:
        _refuse(error.line)
    except OSError as error:
        _refuse(f"{error.filename or path}: {error.strerror or error}; give another place by -o")
    layout, parameters = found.module.layout, sum(part.numel() for part in found.module.parameters())
    grains = " and ".join(f"{high} x {wide}" for high, wide in layout.grains)
    print(f"{given.family}: {layout.codebook_size:,} entries, {grains} pixels a code, {parameters:,} parameters")
    print(f"weights: {found.origin['weights']}")
    dropped = ", ".join(f"{count} of {group}" for group, count in sorted(found.dropped.items())) or "nothing"
    print(one_line(f"left out: {dropped}"))
    print(f"export: {path} ({identity})")


def _refuse(message: str) -> NoReturn:
    print(f"error: {one_line(message.removeprefix('argument '))}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
