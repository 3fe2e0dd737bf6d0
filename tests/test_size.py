"""tools/size.py counts what it says."""

from importlib import util
from pathlib import Path

spec = util.spec_from_file_location("size", Path(__file__).parents[1] / "tools" / "size.py")
size = util.module_from_spec(spec)
spec.loader.exec_module(size)


def test_lines_and_constructs_are_counted(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text(
        '"""One\n\ntwo."""\n\nif isinstance(1, int):\n    raise ValueError(\n        "x"\n    )\n'
    )
    (tmp_path / "inner" / "b.py").write_text("def f():\n    '''Three.'''\n    check('x', 1, 'y', True)\n" + "\n" * 350)
    found = size.count(tmp_path)
    assert (found["files"], found["lines"]) == (2, 8 + 353)
    assert found["doc-string lines"] == 4
    assert (found["raise statements"], found["lines in raise"]) == (1, 3)
    assert (found["calls of isinstance"], found["calls of check"], found["files over 350 lines"]) == (1, 1, 1)
    assert size.largest(tmp_path, 1) == [(353, "inner/b.py")]
