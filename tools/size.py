"""How much there is to read and how fast it answers: `make size`, or for revisions `make size ARGS="--rev REV ."`.

Each revision named after `--rev` is a column; `.` is the working tree, which is the default. Times are CPU seconds
(user and system, children included), the least of three runs, so that a busy machine changes them little. `--tests`
adds the time of the whole test suite (wall clock, one run), `--json FILE` writes all numbers down, and `--no-times`
leaves times out.
"""

import argparse
import ast
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = ("hydra", "torch, torchvision", "graincode")
JOB = "graincode-train-tokenizer"


def count(source: Path) -> dict[str, int]:
    """Lines and constructs of all Python files below `source`."""
    numbers = dict.fromkeys(
        ("files", "lines", "doc-string lines", "raise statements", "lines in raise", "calls of check"), 0
    )
    numbers |= {"calls of isinstance": 0, "files over 350 lines": 0}
    for path in sorted(source.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        numbers["files"] += 1
        numbers["lines"] += lines
        numbers["files over 350 lines"] += lines > 350
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise):
                numbers["raise statements"] += 1
                numbers["lines in raise"] += node.end_lineno - node.lineno + 1
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                numbers["calls of isinstance"] += node.func.id == "isinstance"
                numbers["calls of check"] += node.func.id in ("check", "check_choice")
            elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                numbers["doc-string lines"] += node.body[0].end_lineno - node.body[0].lineno + 1
    return numbers


def largest(source: Path, number: int = 10) -> list[tuple[int, str]]:
    """(lines, path) of the longest files, longest first."""
    sizes = [
        (len(path.read_text(encoding="utf-8").splitlines()), str(path.relative_to(source)))
        for path in source.rglob("*.py")
    ]
    return sorted(sizes, reverse=True)[:number]


def cpu_seconds(root: Path, arguments: list[str], runs: int = 3) -> float:
    """Least CPU time of `python ARGUMENTS` in a checkout; NaN if the command fails."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    best = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(runs):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode:
                return float("nan")
            best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(best, 2)


def test_seconds(root: Path) -> float:
    """Wall-clock time of the test suite, two files at a time, as `make test` runs it."""
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    options = ["--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=root, env=environment, stdout=sys.stderr)
    return round(time.perf_counter() - start) if not done.returncode else float("nan")


def commands(root: Path) -> dict[str, list[str]]:
    """What is timed, by name: imports, and a job as its console script starts it."""
    module, _, function = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"][
        JOB
    ].partition(":")
    job = ["-c", f"import sys; sys.argv[0] = {JOB!r}; from {module} import {function} as main; main()"]
    return {f"import {name} (s)": ["-c", f"import {name}"] for name in IMPORTS} | {
        f"{JOB} {flags} (s)": [*job, *flags.split()] for flags in ("--help", "--cfg job")
    }


@contextmanager
def checkout(revision: str):
    """Folder with the files of a revision; the working tree itself for `.`."""
    if revision == ".":
        yield ROOT
        return
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
        yield Path(folder)


def measure(revision: str, times: bool, tests: bool) -> dict:
    """All numbers of one revision."""
    with checkout(revision) as root:
        numbers: dict = {f"source: {name}": value for name, value in count(root / "src").items()}
        numbers["tests: lines"] = count(root / "tests")["lines"]
        readme = (root / "README.md").read_text(encoding="utf-8")
        numbers["README: lines"] = len(readme.splitlines())
        numbers["README: words"] = len(readme.split())
        if times:
            numbers |= {name: cpu_seconds(root, arguments) for name, arguments in commands(root).items()}
        if tests:
            numbers["make test (s of wall clock)"] = test_seconds(root)
        return {"numbers": numbers, "largest": largest(root / "src" / "graincode")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rev", nargs="+", default=["."], help="git revisions, one column each; . is the working tree")
    parser.add_argument("--tests", action="store_true", help="run the test suite of each, too")
    parser.add_argument("--no-times", action="store_true", help="count only")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    arguments = parser.parse_args()

    columns = {revision: measure(revision, not arguments.no_times, arguments.tests) for revision in arguments.rev}
    names = list(dict.fromkeys(name for column in columns.values() for name in column["numbers"]))
    print(f"{'':42}" + "".join(f"{revision:>14.12}" for revision in columns))
    for name in names:
        print(f"{name:42}" + "".join(f"{column['numbers'].get(name, ''):>14}" for column in columns.values()))
    for revision, column in columns.items():
        print(f"\nlargest files of {revision}")
        print("\n".join(f"{lines:6}  {path}" for lines, path in column["largest"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
