"""Text files are UTF-8, whatever a machine's language is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file.relative_to(ROOT)
    for folder in ("src", "tools", "experiments")
    for file in (ROOT / folder).rglob("*.py")
    if "soak" not in file.parts  # which reads what the system itself says, on Linux alone
)
POSITION = {"read_text": 0, "write_text": 1}  # of the encoding, without a name


def names_no_encoding(source: str) -> list[int]:
    """Lines that read or write text in the encoding of the machine."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if _is_text(call) and not any(k.arg == "encoding" for k in call.keywords)]


def _is_text(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in POSITION:
        return len(call.args) <= POSITION[name]
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = {value.value for value in values if isinstance(value, ast.Constant) and value.value in ("r", "w", "a", "x")}
    is_file = ast.unparse(call.func) != "archive.open"  # whose members are bytes
    return name == "open" and is_file and bool(modes or not values)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_text_is_read_and_written_as_utf_8(file):
    assert names_no_encoding((ROOT / file).read_text(encoding="utf-8")) == []


def test_a_file_without_an_encoding_is_noticed():
    wrong = ["p.read_text()", 'p.write_text("a")', 'open("a", "w")', 'p.open("a")', "p.open()"]
    right = [
        'p.read_text("utf-8")',
        'p.write_text("a", encoding="utf-8")',
        'p.open("rb")',
        'p.open("a", encoding="ascii")',
    ]
    assert [names_no_encoding(line) for line in wrong + right] == [[1]] * 5 + [[]] * 4
