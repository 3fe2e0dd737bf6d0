"""A page that compares runs. `graincode-report --help` shows how."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graincode.core.errors import check, in_one_line, one_line, print_anything
from graincode.jobs.list_runs import age, shown
from graincode.runs.listing import ListedRun, find_run, side_by_side
from graincode.runs.table import COLOURS

_LARGEST = 2**22  # bytes of a picture
_LOGARITHMIC = ("loss", "mse", "gradient_norm")  # how names of curves begin that are drawn so


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line. Exit statuses: 0; 2 and one line on standard error for bad input."""
    print_anything()
    parser = argparse.ArgumentParser("graincode-report", description="Compare runs on one page, a file of its own.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="its path, NAME or JOB/NAME")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are looked for by name")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (report.html)")
    given = parser.parse_args(arguments)
    with in_one_line():
        check(
            "runs",
            len(given.runs),
            f"at most {len(COLOURS)}, of which each has a colour",
            len(given.runs) <= len(COLOURS),
        )
        runs = [find_run(name, given.folder) for name in dict.fromkeys(given.runs)]
        print(write_report(given.output, runs))


def write_report(path: Path, runs: Sequence[ListedRun]) -> Path:
    """Write the page that compares runs, and give its path."""
    from graincode.pages import write_page  # here, as what it imports takes seconds

    settings, metrics = side_by_side(runs)
    several = len({run.job for run in runs}) > 1
    names = [one_line(f"{run.job}/{run.name}" if several else run.name) for run in runs]
    curves = list(_curves([*zip(names, runs, strict=True)]))
    return write_page(
        path,
        Path(__file__).with_suffix(".html"),
        runs=list(zip(names, COLOURS, runs, [age(time.time() - run.changed) for run in runs], strict=False)),
        job=None if several else runs[0].job,
        settings={one_line(key): list(map(shown, values)) for key, values in settings.items()},
        metrics={one_line(key): values for key, values in metrics.items()},
        main_curves=[curve for curve in curves if curve[0].startswith(("val/", "train/"))],
        other_curves=[curve for curve in curves if not curve[0].startswith(("val/", "train/"))],
        pictures=_pictures(names, runs),
    )


def _curves(runs: Sequence[tuple[str, ListedRun]]) -> Iterator[tuple[str, Any]]:
    """A chart for each number that the logs have at two steps or more: those of evaluations come first."""
    import numpy as np
    from markupsafe import Markup

    from graincode.pages import draw_curve, logarithmic
    from graincode.pictures import chart, to_svg
    from graincode.training.trackers import read_log

    logs = [read_log(run.path) for _, run in runs]
    seen: set[bytes] = set()
    keys = dict.fromkeys(key for lines in logs for line in lines for key in line if key != "step")
    for key in sorted(keys, key=lambda key: (not key.startswith("val/"), key == "val/objective")):
        lines = [np.array([(line["step"], line[key]) for line in log if key in line], float) for log in logs]
        data = b"".join(points.tobytes() for points in lines)
        if data in seen or not any(len(points) > 1 for points in lines):
            continue  # as the objective, which is one of the metrics
        seen.add(data)
        figure, axes = chart()
        for points, colour in zip(lines, COLOURS, strict=False):
            if len(points):
                draw_curve(axes, points, colour)
        axes.set(xlabel="step", xlim=(0, None))
        low, high = (f([f(points[:, 1]) for points in lines if len(points)]) for f in (np.min, np.max))
        if key.partition("/")[2].startswith(_LOGARITHMIC) and 0 < 4 * low < high:
            logarithmic(axes)
        yield one_line(key), Markup(to_svg(figure, one_line(key)))


def _pictures(names: Sequence[str], runs: Sequence[ListedRun]) -> Mapping[str, list[tuple[str, str]]]:
    """The pictures that runs left, by their name: of each the name of its run, and its address."""
    from graincode.pages import png_address

    found: dict[str, list[tuple[str, str]]] = {}
    for name, run in zip(names, runs, strict=True):
        for file in [*sorted((run.path / "pictures").glob("*.png")), run.path / "samples.png"]:
            if file.is_file() and file.stat().st_size <= _LARGEST:
                content = file.read_bytes()
                if content.startswith(b"\x89PNG"):
                    found.setdefault(file.stem.replace("_", " "), []).append((name, png_address(content)))
    return found


if __name__ == "__main__":
    main()
