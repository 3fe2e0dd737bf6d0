"""What the README tells its readers to type is understood."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from graincode.config.validate import check

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def commands():
    """(job, overrides) of each command line that starts one."""
    made = re.findall(
        r"^([a-z0-9-]+):.*\n\t@\$\(BIN\)/graincode-(.*) \$\(ARGS\)", (ROOT / "Makefile").read_text(), re.M
    )
    targets = dict(made)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", TEXT, re.M | re.S):
        for line in block.splitlines() if not language else []:
            words = shlex.split(line, comments=True)
            if not words:
                continue
            if words[0] == "make" and words[1] in targets:
                arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
                words = shlex.split(" ".join([targets[words[1]], *arguments]))
            elif words[0].startswith("graincode-"):
                words[0] = words[0].removeprefix("graincode-")
            else:
                continue
            job = words[0].replace("-", "_").replace("demo", "train_tokenizer")
            yield job, [first(word) for word in words[1:] if word != "--multirun"]


def first(override):
    """The first value of a sweep."""
    parsed = OverridesParser.create().parse_override(override)
    return f"{parsed.key_or_group}={next(parsed.sweep_string_iterator())}" if parsed.is_sweep_override() else override


@pytest.mark.parametrize(
    ("job", "overrides"), [pytest.param(*one, id=" ".join([one[0], *one[1]])) for one in commands()]
)
def test_a_command_is_understood(job, overrides):
    check(job, overrides)
