"""What may make objects from text, and what may read files that could hold programs: each place, and why."""

import ast
import json
import os
from pathlib import Path

import pytest
from helpers import TINY_GENERATOR, TINY_TRAINER, command

ROOT = Path(__file__).parents[1]

MAKERS = {
    "instantiate", "import_module", "__import__", "get_class", "get_method", "get_static_method", "get_object",
    "locate", "resolve_name", "eval", "exec", "spec_from_file_location", "exec_module", "run_path", "run_module",
}  # fmt: skip
KNOWN = {
    ("src/graincode/__init__.py", "import_module"): "a public name of the package",
    ("src/graincode/config/job.py", "import_module"): "the job of this command",
    ("src/graincode/config/job.py", "instantiate"): "a node of this command's configuration, see BUILT",
    ("src/graincode/config/validate.py", "resolve_name"): "a class that this command's configuration names",
    ("src/graincode/distributed/worker.py", "import_module"): "the entry of the command that started this process",
    ("src/graincode/export.py", "import_module"): "a class of the list of classes, or a module of $GRAINCODE_PLUGINS",
    ("experiments/soak/writes.py", "import_module"): "the jobs, by their own list",
    ("src/graincode/interop/convert.py", "import_module"): "a family of the list of families",
}
BUILT = ("cfg.", "settings.", "config.", "steps[0].config.", "with_layout(cfg.", "check('train_tokenizer', COMMON)")
"""What `build` gets: parts of configurations that were composed for this command."""


def calls(*folders: str):
    """(file, name, call) of every call below folders."""
    for file in sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield file.relative_to(ROOT).as_posix(), name, node


@pytest.mark.when(
    "a run's or an export's file names a class", "nothing is built of it but what the list of classes has"
)
def test_every_place_that_makes_objects_from_text_is_known():
    all_calls = list(calls("src", "experiments"))
    method = {"eval", "compile"}  # of modules
    found = {
        (file, name) for file, name, call in all_calls
        if name in MAKERS and not (name in method and isinstance(call.func, ast.Attribute))
    }  # fmt: skip
    assert found == set(KNOWN)
    built = [ast.unparse(call.args[0]) for _, name, call in all_calls if name == "build" and call.args]
    assert len(built) > 20
    assert [text for text in built if not text.startswith(BUILT)] == []
    files = {file for file, name, _ in all_calls if name == "build_node"}
    assert files == {f"src/graincode/{name}.py" for name in ("export", "interop/convert", "interop/names")}


def test_nothing_is_unpickled_and_no_yaml_makes_objects():
    for file, name, call in calls("src", "experiments"):
        text, given = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        if text in ("torch.load", "torch.hub.load_state_dict_from_url"):
            assert given.get("weights_only") == "True", file
        if text in ("np.load", "numpy.load"):
            assert given.get("allow_pickle", "False") == "False", file
        assert not text.startswith(("pickle.", "dill.", "joblib.", "marshal.", "shelve.", "yaml.", "cPickle.")), file
        assert name not in ("unsafe_load", "full_load"), file


def test_configurations_are_read_from_conf_and_from_this_command_alone():
    found = {(file, ast.unparse(call.args[0])) for file, _, call in calls("src", "experiments")
             if ast.unparse(call.func) == "OmegaConf.load"}  # fmt: skip
    assert found == {
        ("src/graincode/config/errors.py", "file"),  # of conf/
        ("src/graincode/config/schema.py", "config_directory() / f'{name}.yaml'"),
        ("src/graincode/distributed/worker.py", "folder / 'config.yaml'"),  # of the process that started this one
    }


HOSTILE = {"_target_": "os.system", "command": "touch owned", "_args_": ["touch owned"]}


def test_hostile_files_of_a_run_run_nothing(inside, monkeypatch, tmp_path):
    training = [*TINY_GENERATOR, *TINY_TRAINER, "codes_path=runs/extract_codes/codes/codes", "run_name=hostile"]
    command("train_generator", *training)
    run = Path("runs/train_generator/hostile")
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it ran"))
    config = json.loads((run / "config.json").read_text())
    for name in ("data", "generator", "logging", "_target_"):
        (run / "config.json").write_text(json.dumps(config | {name: HOSTILE, "hydra": HOSTILE}))
        command("train_generator", *training)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"metrics": HOSTILE, "data": HOSTILE}))
    command("train_generator", *training)
    assert not list(Path().rglob("owned"))
