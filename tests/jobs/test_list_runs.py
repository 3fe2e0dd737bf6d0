"""`graincode-runs` as a user types it."""

import json
import subprocess
import sys
import time

import pytest

from graincode.jobs.list_runs import age, main, short_keys


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name, rate, objective):
        folder = tmp_path / "runs" / "train" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"config": {}, "identity": {"optimizer.lr": rate, "seed": 0}}))
        (folder / "result.json").write_text(json.dumps({"objective": objective, "metrics": {"mse": objective}}))
        return folder

    return make


def test_lists_runs_with_what_differs(runs, capsys):
    runs("a", 0.1, 2.0), runs("b", 0.2, 1.0)
    main([])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["job", "name", "state", "objective", "age", "what", "differs"]
    assert sorted(line.split()[:4] + line.split()[-1:] for line in lines) == [
        ["train", "a", "finished", "2", "lr=0.1"], ["train", "b", "finished", "1", "lr=0.2"],
    ]  # fmt: skip
    main(["--best"])
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["train", "b", "finished", "1"]
    main(["--diff", "a", "b"])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["optimizer.lr", "0.1", "0.2"] in shown
    assert ["mse", "2", "1"] in shown
    main(["runs/train", "--json"])
    known = json.loads(capsys.readouterr().out)
    assert {run["name"]: run["differs"] for run in known} == {"a": {"optimizer.lr": 0.1}, "b": {"optimizer.lr": 0.2}}


@pytest.mark.when("the name of a run holds control characters", "graincode-runs prints them as escapes")
@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\u202eevil", "x" * 200, "caf\u00e9 \u2603"])
def test_names_are_printed_safely(name, runs, capsys):
    runs(name, "\x1b]0;title\x07", 1.0), runs("other", 0.2, 1.0)
    for arguments in ([], ["--best"], ["--json"], ["--diff", name, "other"]):
        main(arguments)
        text = capsys.readouterr().out
        assert all(character.isprintable() for character in text.replace("\n", ""))
        assert len(text.splitlines()) < 60
    main([])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_missing_directory_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: runs: no directory of runs; give another, such as runs\n"


def test_it_imports_no_torch():
    code = "import sys, graincode.jobs.list_runs; sys.exit(bool({'torch', 'hydra', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (59, "59 s"), (3600, "1 h"), (86400 * 3, "3 d")])
def test_age_is_in_its_largest_unit(seconds, words):
    assert age(seconds) == words


def test_keys_are_as_short_as_tells_them_apart():
    assert short_keys(["a.b.c", "a.d.c", "seed"]) == {"a.b.c": "b.c", "a.d.c": "d.c", "seed": "seed"}
    assert short_keys(["seed", "data.seed"]) == {"seed": "seed", "data.seed": "data.seed"}


def test_json_of_numbers_that_json_has_not_is_null(runs, capsys):
    run = runs("a", float("nan"), 1.0)
    (run / "machine.json").write_text('{"memory": 1e999}')
    main(["--json"])
    known = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (known[0]["settings"]["optimizer.lr"], known[0]["machine"]["memory"]) == (None, None)


def test_a_thousand_runs_are_all_listed(runs, capsys):
    for index in range(1000):
        runs(f"run{index}", index, float(index))
    began = time.perf_counter()
    main([])
    print(f"{time.perf_counter() - began:.2f} s", file=sys.stderr)
    assert len(capsys.readouterr().out.splitlines()) == 1001
