"""Errors are shown on one line, on any terminal."""

import logging
import os
import subprocess
import sys

import pytest

from graincode.core.errors import GraincodeError, OneLineFormatter, one_line

NAMES = ["a\nerror: type rm", "a\r\x1b[2Kb", "a\u2028b", "a\u202egnp.b", "a\x85b", "a\udcffb", "a\x00b"]
SHOW = """
import subprocess, sys
from graincode.core.errors import print_anything

print_anything()
print("1 ± 2 \\udcff")
print("3 ± 4", file=sys.stderr)
sys.stdout.flush()
if len(sys.argv) == 1:
    subprocess.run([sys.executable, __file__, "again"])
"""


@pytest.mark.when("a file's name holds a line break or an escape code", "it is shown as an escape, on one line")
@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_within_its_line(name):
    line = GraincodeError(f"/data/{name}.png: cannot be read").line
    assert line == one_line(line)
    assert line.isprintable()
    assert line.startswith("/data/a")
    assert line.endswith(".png: cannot be read")
    record = logging.LogRecord("", logging.INFO, "", 0, "%s is left out", (name,), None)
    assert OneLineFormatter("%(message)s").format(record).isprintable()


def test_a_worker_s_traceback_is_left_out_and_plain_text_stays():
    told = "Caught it in worker 0.\nOriginal Traceback:\n  at x\ngraincode.core.errors.GraincodeError: a\nb: no"
    assert GraincodeError(told).line == r"a\nb: no"
    assert one_line("müller ± 写真 ~/a b") == "müller ± 写真 ~/a b"


@pytest.mark.when("a terminal's encoding lacks a letter or a sign", "it is printed as an escape")
def test_any_terminal_shows_all(tmp_path):
    file = tmp_path / "show.py"
    file.write_text(SHOW, encoding="utf-8")
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.splitlines() == [r"1 \xb1 2 \udcff"] * 2
    assert done.stderr.splitlines() == [r"3 \xb1 4"] * 2
