from pathlib import Path

import pytest
import torch
from helpers_data import WNIDS, gray, levels, names_of, one_line, write, write_files, write_images

from graincode.core.errors import GraincodeError
from graincode.data import FFHQ, ImageFolder, ImageNet
from graincode.data.decoding import EXTENSIONS
from graincode.data.images import SPLITS


def files_of(source: ImageFolder, root: Path) -> dict[str, set[str]]:
    return {
        name: {Path(file).relative_to(root).as_posix() for file in names_of(source.split(name))}
        for name in ("train", "val", "test")
    }


def test_a_small_folder_just_works(tmp_path):
    names = {f"{i}.png" for i in range(20)}
    source = ImageFolder(str(write_images(tmp_path, *names)), image_size=8)
    files = files_of(source, tmp_path)
    assert all(files.values())
    assert files["train"] | files["val"] | files["test"] == names
    assert sum(map(len, files.values())) == 20
    assert source.class_names == ()
    split = source.split("train")
    batch = split[range(len(split))]
    assert batch.images.shape == (len(split), 3, 8, 8)
    assert batch.images.abs().max() <= 1
    assert batch.labels.eq(0).all()
    assert (split.name, split.split, split.image_size) == (tmp_path.name, "train", (8, 8))
    assert list(names_of(split)) == sorted(names_of(split))
    assert torch.equal(split[[2, 0]].images, torch.cat([split[2].images, split[0].images]))
    assert split.content_hash() == source.split("train").content_hash() != source.split("val").content_hash()


def test_classes_are_the_first_level_directories(tmp_path):
    names = [f"{label}/deep{i % 2}/{i}.PNG" for label in ("cat", "ant", "bee") for i in range(8)]
    source = ImageFolder(str(write_images(tmp_path, *names)), image_size=8)
    assert source.class_names == ("ant", "bee", "cat")
    for name in ("train", "val", "test"):
        split = source.split(name)
        assert split.class_names == source.class_names
        for file, label in zip(names_of(split), split.labels.tolist(), strict=True):
            assert Path(file).relative_to(tmp_path).parts[0] == source.class_names[label]
    unlabelled = ImageFolder(str(tmp_path), image_size=8, classes="none")
    assert unlabelled.class_names == ()
    assert files_of(unlabelled, tmp_path) == files_of(source, tmp_path)
    assert unlabelled.split("train").labels.eq(0).all()


def test_given_splits_are_kept(tmp_path):
    write_images(
        tmp_path, *(f"{split}/{label}/{i}.png" for split in ("train", "val", "test") for label in "ab" for i in "12")
    )
    source = ImageFolder(str(tmp_path), image_size=8)
    assert source.class_names == ("a", "b")
    for name, files in files_of(source, tmp_path).items():
        assert files == {f"{name}/a/1.png", f"{name}/a/2.png", f"{name}/b/1.png", f"{name}/b/2.png"}


@pytest.mark.parametrize(("given", "missing"), [("val", "test"), ("test", "val")])
def test_a_missing_split_is_taken_out_of_train(tmp_path, given, missing):
    names = {f"train/{i}.png" for i in range(10)}
    write_images(tmp_path, *names, f"{given}/0.png")
    files = files_of(ImageFolder(str(tmp_path), image_size=8), tmp_path)
    assert files[given] == {f"{given}/0.png"}
    assert files[missing]
    assert files[missing] < names
    assert files["train"] == names - files[missing]


def two_classes(*folders: str, count: int = 4) -> list[str]:
    return [f"{folder}/{label}/{i}.png" for folder in folders for label in "ab" for i in range(count)]


@pytest.mark.when("split folders are called training, valid, validation, dev or testing", "they are the splits")
@pytest.mark.parametrize(
    "names",
    [
        ("train", "valid", "test"),
        ("training", "validation", "testing"),
        ("Train", "Val", "Test"),
        ("TRAINING", "Dev", "TEST"),
        ("train", "valid", None),
        ("training", None, "testing"),
        ("Training", None, None),
    ],
)
@pytest.mark.parametrize("around", ["", "mydata/", "mydata/images/"])
def test_split_folders_by_all_their_names(tmp_path, names, around):
    write_images(tmp_path, *two_classes(*(f"{around}{name}" for name in names if name)))
    source = ImageFolder(str(tmp_path), image_size=8)
    assert source.class_names == ("a", "b")
    files = files_of(source, tmp_path)
    for split, name in zip(SPLITS, names, strict=True):
        assert {file.removeprefix(around).split("/")[0] for file in files[split]} == {name or names[0]}
    assert sum(map(len, files.values())) == 8 * sum(map(bool, names))


def test_folders_without_images_and_junk_are_no_classes(tmp_path, caplog):
    write_images(tmp_path, *two_classes("train"), "__MACOSX/train/1.png", "@eaDir/2.png", ".cache/3.png")
    write_files(tmp_path, {"annotations/train.json": b"{}", "README.md": b""})
    source = ImageFolder(str(tmp_path), image_size=8)
    assert source.class_names == ("a", "b")
    assert sum(map(len, files_of(source, tmp_path).values())) == 8


def test_what_lies_beside_two_split_folders_is_left_out_and_counted(tmp_path, caplog):
    caplog.set_level("WARNING")  # whatever a job has set before
    write_images(tmp_path, *two_classes("train", "val"), "masks/1.png", "masks/2.png", "logo.png")
    source = ImageFolder(str(tmp_path), image_size=8)
    assert source.class_names == ("a", "b")
    assert len(source.split("val")) == 8
    (line,) = caplog.messages
    assert "left out 3 images beside its splits" in line


@pytest.mark.when(
    "a folder called train stands among class folders", "the run stops and says what to type, data.splits=none"
)
@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("train", "bus"), "'train'"),
        (("test", "bus"), "'test'"),
        (("val", "test"), "'test'"),
        (("dev",), "'dev'"),
        (("train", "val", "valid"), "'valid'"),
        (("train", "Train"), "'Train'"),
        (("vehicles/train", "vehicles/bus"), "vehicles"),
    ],
)
def test_a_split_name_among_classes_is_asked_about(tmp_path, folders, named):
    write_images(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(5)))
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(tmp_path)).split("train")
    one_line(error, str(tmp_path), named, "move one away")
    whole = ImageFolder(str(tmp_path), splits="none")
    assert whole.class_names == tuple(sorted({folder.split("/")[0] for folder in folders}))
    assert sum(len(whole.split(name)) for name in SPLITS) == 5 * len(folders)


def test_hidden_and_other_files_are_passed_over(tmp_path):
    write_images(tmp_path, "1.png", "2.jpg", "3.webp", ".hidden.png", ".thumbnails/4.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = files_of(ImageFolder(str(tmp_path)), tmp_path)
    assert set.union(*files.values()) == {"1.png", "2.jpg", "3.webp"}


def test_a_root_without_images_is_refused(tmp_path):
    for root in (tmp_path / "missing", tmp_path):
        for use in (lambda source: source.class_names, lambda source: source.split("train")):
            with pytest.raises(GraincodeError) as error:
                use(ImageFolder(str(root)))
            one_line(error, str(root))
    one_line(error, *EXTENSIONS)


def test_images_beside_class_folders_are_refused(tmp_path):
    write_images(tmp_path, "a/1.png", "b/2.png", "3.png")
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(tmp_path)).split("train")
    one_line(error, str(tmp_path / "3.png"), "classes=none")
    assert len(ImageFolder(str(tmp_path), classes="none").split("train")) == 1


@pytest.mark.when("there are two images in all", "what to type leaves one to train and one to validate on")
def test_too_few_images_for_the_splits(tmp_path):
    source = ImageFolder(str(write_images(tmp_path, "1.png", "2.png")))
    with pytest.raises(GraincodeError) as error:
        source.split("train")
    one_line(error, str(tmp_path), "add some or give test_fraction=0")
    two = ImageFolder(str(tmp_path), test_fraction=0)
    assert len(two.split("train")) == len(two.split("val")) == 1
    source = ImageFolder(str(tmp_path), val_fraction=0, test_fraction=0)
    assert len(source.split("train")) == 2
    with pytest.raises(GraincodeError) as error:
        source.split("val")
    one_line(error, "val_fraction=0")
    (tmp_path / "2.png").unlink()
    with pytest.raises(GraincodeError) as error:
        ImageFolder(str(tmp_path)).split("train")
    assert str(error.value).endswith("add some")


@pytest.mark.parametrize(
    "arguments",
    [
        {"root": None},
        {"image_size": 0},
        {"image_size": True},
        {"image_size": "64"},
        {"image_size": 64.5},
        {"image_size": [64]},
        {"image_size": [64, -1]},
        {"crop": "random"},
        {"classes": "names"},
        {"splits": "train"},
        {"test_fraction": 0.4, "val_fraction": 0.6},
        {"val_fraction": -0.1},
        {"test_fraction": float("nan")},
        {"test_fraction": "a tenth"},
    ],
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(GraincodeError) as error:
        ImageFolder(**{"root": "/images"} | arguments)
    name, value = next(iter(arguments.items()))
    one_line(error, f"{name}={value}", "expected")


# ImageNet


@pytest.mark.parametrize("below", ["", "ILSVRC/Data/CLS-LOC"])
def test_the_published_validation_images_of_imagenet_are_our_test_split(tmp_path, below):
    write("imagenet", tmp_path / below, [gray(level) for level in range(80)])
    source = ImageNet(str(tmp_path), image_size=8, val_fraction=0.1)
    found = levels(source)
    assert sorted(found["test"]) == list(range(40))
    assert sorted(found["train"] + found["val"]) == list(range(40, 80))
    assert len(found["val"]) in range(1, 10)
    assert source.class_names == WNIDS
    assert source.split("test").name == "imagenet"
    few = levels(ImageNet(str(tmp_path), image_size=8))
    assert set(few["val"]) < set(found["val"])


def test_imagenet_validates_on_one_percent():
    assert ImageNet("/x").image_size == FFHQ("/x").image_size == (256, 256)
    assert ImageNet("/x").val_fraction == 0.01


@pytest.mark.parametrize(("name", "part"), [("val/5.JPEG", "val"), ("val/n9/5.JPEG", "val"), ("train/5.JPEG", "train")])
def test_an_image_of_imagenet_in_no_class_folder_is_named(tmp_path, name, part):
    write("imagenet", tmp_path, [gray(level) for level in range(8)])
    write_files(tmp_path, {name: gray(0)})
    with pytest.raises(GraincodeError) as error:
        ImageNet(str(tmp_path)).split("train")
    one_line(error, str(tmp_path / name), "n01440764")


# FFHQ


@pytest.mark.parametrize("pattern", ["images1024x1024/{0:02d}000/{1}", "thumbnails128x128/{0:02d}000/{1}", "{1}"])
def test_the_faces_from_60000_on_are_the_test_split(tmp_path, pattern):
    numbers = [*range(0, 60000, 2000), 59999, 60000, 69999]
    write_files(tmp_path, {pattern.format(n // 1000, f"{n:05d}.png"): gray(i) for i, n in enumerate(numbers)})
    source = FFHQ(str(tmp_path), image_size=8, val_fraction=0.2)
    files = {name: [int(Path(file).stem) for file in names_of(source.split(name))] for name in SPLITS}
    assert files["test"] == [60000, 69999]
    assert sorted(files["train"] + files["val"]) == numbers[:-2]
    assert files["train"] == sorted(files["train"])
    assert len(files["val"]) in range(1, 15)
    assert source.class_names == ()
    assert source.split("train").labels.eq(0).all()
    other = FFHQ(str(tmp_path), image_size=8, val_fraction=0.2)
    assert levels(other) == {name: [numbers.index(n) for n in files[name]] for name in SPLITS}


def test_the_split_of_a_face_does_not_depend_on_the_layout(tmp_path):
    numbers = [f"{n:05d}" for n in range(0, 60000, 1500)]
    write_files(tmp_path, {f"a/{n}.png": gray(i) for i, n in enumerate(numbers)})
    write_files(tmp_path, {f"b/images1024x1024/{n[:2]}000/{n}.png": gray(i) for i, n in enumerate(numbers)})
    splits = [FFHQ(str(tmp_path / layout), image_size=8).split("val").content_hash() for layout in "ab"]
    assert splits[0] == splits[1]


@pytest.mark.parametrize("name", ["face.png", "1/00002.png"])
def test_a_file_that_is_no_numbered_face_is_named(tmp_path, name):
    write_files(tmp_path, {"00001.png": gray(0), "00002.png": gray(0), name: gray(0)})
    with pytest.raises(GraincodeError) as error:
        FFHQ(str(tmp_path)).split("train")
    one_line(error, "expected each number once")


def test_faces_below_60000_alone_have_no_test_split(tmp_path):
    source = FFHQ(str(write_files(tmp_path, {f"{n:05d}.png": gray(n) for n in range(40)})), image_size=8)
    assert len(source.split("train")) + len(source.split("val")) == 40
    with pytest.raises(GraincodeError) as error:
        source.split("test")
    one_line(error, "expected test images")
