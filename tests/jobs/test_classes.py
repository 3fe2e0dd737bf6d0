"""Classes are compared by name: of data, codes and generators."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TRAINER, command, refusal

from graincode.core.errors import GraincodeError
from graincode.core.layout import other_classes
from graincode.data.codes import CodeDataset
from graincode.evaluation.samples import balanced_labels
from graincode.export import load_export

TOKENIZER = "tokenizer_path=runs/train_tokenizer/tok/export"
LITE0 = "features=lite0_112"


def renamed(names: list[str], **provenance: list[str]) -> str:
    """The override for a copy of the generator whose classes have other names."""
    path = Path(f"renamed-{'-'.join(names)}")
    if not path.exists():
        shutil.copytree("runs/train_generator/ar/export", path)
        config = json.loads((path / "config.json").read_text())
        config["provenance"] |= {"class_names": names, **provenance}
        (path / "config.json").write_text(json.dumps(config))
    return f"generator_path={path}"


@pytest.mark.when("classes=[cat] names classes to sample", "the names of the generator's training data are found")
def test_classes_are_asked_for_by_name(inside, capsys):
    paths = [TOKENIZER, "generator_path=runs/train_generator/ar/export"]
    command("sample", *paths, "num_samples=2", "batch_size=2", "classes=[smooth]", "run_name=by-name")
    command("sample", *paths, "num_samples=2", "batch_size=2", "classes=[1]", "run_name=by-number")
    by_name, by_number = (np.load(f"runs/sample/by-{how}/samples.npz") for how in ("name", "number"))
    assert all(np.array_equal(by_name[key], by_number[key]) for key in by_name.files)
    assert by_name["labels"].tolist() == [1, 1]
    expected = "classes=[smoth]: expected labels from 0 to 1, such as [0] or names such as [busy]"
    assert expected in refusal(capsys, "sample", *paths, "classes=[smoth]")


@pytest.mark.slow
@pytest.mark.when("a generator's classes are not those of the data", "class accuracies are left out, with the names")
def test_samples_of_other_classes_are_compared_with_a_warning(inside, capsys):
    for names, words in (
        (["cat", "dog"], "classes cat, dog instead of busy, smooth of the"),
        (["smooth", "busy"], "classes smooth, busy instead of busy, smooth of the"),
    ):
        settings = [*inside, LITE0, TOKENIZER, renamed(names), "evaluation.floor=false", "images.num_samples=4"]
        run = f"runs/evaluate/{names[0]}"
        command("evaluate", *settings, "reference.split=test", "batch_size=4", f"run_name={names[0]}")
        record = json.loads(Path(f"{run}/metrics.json").read_text())
        assert f"the images are of {words} reference" in "\n".join(record["warnings"])
        assert f"class_consistency left out: the images are of {words} data set" in "\n".join(record["warnings"])
        assert not any("class_accuracy" in name for name in record["metrics"])
    other = "has classes busy, smooth instead of smooth, busy of the generator"
    for more in (["images.labels=reference"], ["evaluation=likelihood", "images=split"]):
        chosen = (
            settings if "images=split" not in more else [s for s in settings if not s.startswith(("ev", "images."))]
        )
        assert other in refusal(capsys, "evaluate", *chosen, *more)
    given = ["given.codes_path=runs/extract_codes/codes/codes", "given.regions=3", "given.images=1", "num_samples=1"]
    line = refusal(capsys, "sample", TOKENIZER, renamed(names), *given)
    assert "codes of classes busy, smooth instead of smooth, busy" in line
    command("sample", TOKENIZER, renamed(names), *given, "classes=[busy]", "run_name=given-busy")


@pytest.mark.when("a class is drawn of which no training image was", "a warning names it")
def test_classes_without_a_training_image_are_named(inside, capsys):
    assert CodeDataset("runs/extract_codes/codes/codes", "train").absent_classes == []
    generator = renamed(["busy", "smooth"], absent_classes=["smooth"])
    for more, is_named in (["classes=[busy]"], False), ([], True):
        command("sample", TOKENIZER, generator, "num_samples=2", "batch_size=2", *more)
        assert ("no training image was of smooth" in "".join(capsys.readouterr())) == is_named


def test_training_on_codes_that_lack_a_class_says_so(inside, capsys):
    copy = Path(shutil.copytree("runs/extract_codes/codes/codes", "lacking"))
    np.save(copy / "train.labels.npy", np.zeros_like(np.load(copy / "train.labels.npy")))
    about = json.loads((copy / "codes.json").read_bytes())
    del about["identity"], about["splits"]["train"]["sha256"]["labels"]  # as if they had been written so
    (copy / "codes.json").write_text(json.dumps(about), encoding="utf-8")
    command("train_generator", *TINY_GENERATOR, *TINY_TRAINER, f"codes_path={copy}", "run_name=lacking")
    assert "classes without a training image, of which samples show nothing: smooth" in "".join(capsys.readouterr())
    export = load_export("runs/train_generator/lacking/export", "generator")
    assert export.names("absent_classes") == ("smooth",)


def test_names_differ_at_their_places():
    assert other_classes(["a", "b"], ["a", "b"]) == other_classes([], ["a"]) == other_classes(["a"], []) == ""
    assert other_classes(list("abc"), list("acb")) == "classes b, c instead of c, b"
    assert other_classes(list("ab"), list("abc")) == "classes none instead of c"
    assert balanced_labels(3, 3, ["b", 2], "abc").tolist() == [1, 2, 1]
    assert balanced_labels(2, 2, ["1", 1], ["1", "0"]).tolist() == [0, 1]  # a name, and a number
    odd = [os.fsdecode(b"caf\xe9"), "two\nlines"]  # as a shell gives them, and as a data set names its folders
    assert balanced_labels(2, 2, odd, [r"caf\udce9", r"two\nlines"]).tolist() == [0, 1]
    for chosen in (["d"], [3], [-1], [], ["a", 0.5], [None]):
        with pytest.raises(GraincodeError, match=r"^classes=.*: expected labels from 0 to 2"):
            balanced_labels(3, 3, chosen, "abc")
    assert torch.equal(balanced_labels(2, 0, None), torch.zeros(2).long())
