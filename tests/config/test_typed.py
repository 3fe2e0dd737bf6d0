"""What is typed on a command line, whatever Hydra's grammar makes of it."""

import os
import shlex
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from graincode.config.schema import ELSEWHERE, JOBS, config_directory
from graincode.config.typed import parse, quoted, readable
from graincode.config.validate import check
from graincode.core.errors import GraincodeError

NAMES = [
    "müller",
    "写真",
    "a=b",
    "photos (1)",
    "photos[1]",
    "a{1}",
    "a&b",
    "a;b",
    "a#b",
    "a!b",
    "100%",
    "C:\\photos",
    "it's",
    'say "x"',
    'it\'s "x"',
    "ends\\",
    "a'\\",
    "a:b",
    "a b",
    "-x",
    "a (1), b",
    "$HOME",
    "a\nb",
    "null",
    "choice(1,2",
]
FOLDER = ["data=image_folder", "data.image_size=32"]


def value(job, key, *overrides):
    return OmegaConf.select(check(job, list(overrides)), key)


def refused(job, *overrides):
    with pytest.raises(GraincodeError) as error:
        check(job, list(overrides))
    return error.value.line


@pytest.mark.when("a path has signs such as = ( [ & or letters beyond ASCII", "it is taken as typed")
@pytest.mark.parametrize("name", NAMES)
def test_paths_are_taken_as_they_are_typed(name):
    (read,) = readable("train_tokenizer", [f"data.root=/home/{name}"])
    assert str(parse(read).value()) == f"/home/{name}"
    assert parse(f"x={quoted(name)}").value() == name


def test_paths_reach_what_is_built_of_them():
    assert value("train_tokenizer", "data.root", *FOLDER, "data.root=/müller/a=b (1)[2]") == "/müller/a=b (1)[2]"
    assert value("evaluate", "images.path", "images=folder", "images.path=/a&b") == "/a&b"


@pytest.mark.parametrize(
    "typed",
    [
        "tokenizer.ratios=[0.5,0.5]",
        "given.grains=[1",
        "data.root='a b'",
        "seed=1",
        "~data",
        "optimizer.lr=1e-3",
        "+a={b:1}",
        "hydra.job.chdir=true",
        "data.root=",
        "a=[b",
        "x={y",
    ],
)
def test_what_hydra_reads_and_what_begins_as_a_list_stays(typed):
    assert readable("train_tokenizer", [typed]) == [typed]


@pytest.mark.parametrize(
    ("job", "key"),
    [
        ("train_tokenizer", "runs_dir"),
        ("train_tokenizer", "init_from"),
        ("sample", "given.codes_path"),
        ("evaluate", "cache_dir"),
    ],
)
@pytest.mark.parametrize("shape", ["~/a b", "~/runs", '"~/runs"'])
def test_the_home_directory_is_meant_by_a_tilde(job, key, shape, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert value(job, key, f"{key}={shape}") == f"/home/me/{shape.strip('~/').strip(chr(34)).strip('~/')}"


def test_the_home_directory_of_a_data_set_and_in_sweeps(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert value("train_tokenizer", "data.root", *FOLDER, "data.root=~/photos") == "/home/me/photos"
    assert readable("sample", ["-m", "runs_dir=~/a,~/b"]) == ["--multirun", 'runs_dir="/home/me/a","/home/me/b"']


@pytest.mark.when("a name looks like a number, such as run_name=20241128_093000", "it stays as it is typed")
@pytest.mark.parametrize("name", ["20241128_093000", "1e3", "007", "1_000", "0.50", "on", "true", "no"])
def test_text_that_looks_like_a_number_stays_text(name):
    assert value("train_tokenizer", "run_name", f"run_name={name}") == name
    assert value("train_tokenizer", "data.root", *FOLDER, f"data.root={name}") == name
    (_, read) = readable("train_tokenizer", ["--multirun", f"run_name={name},{name}x"])
    assert [str(text).strip('"') for text in parse(read).sweep_string_iterator()] == [name, f"{name}x"]


@pytest.mark.when("a flag such as --multirun stands between settings", "it acts as at the beginning or the end")
@pytest.mark.parametrize(
    ("typed", "name", "meant"),
    [
        (["--multirun"], "multirun", True),
        (["-m"], "multirun", True),
        (["--cfg", "job"], "cfg", "job"),
        (["-c=job"], "cfg", "job"),
        (["--resolve"], "resolve", True),
        (["--info"], "info", "all"),
        (["-i"], "info", "all"),
        (["-i", "plugins"], "info", "plugins"),
        (["-cd", "a b"], "config_dir", "a b"),
        (["--config-dir=x=y"], "config_dir", "x=y"),
        (["-p", "data"], "package", "data"),
    ],
)
def test_flags_are_read_wherever_they_stand(typed, name, meant):
    settings = ["data=image_folder", "data.root=imgs", "seed=1"]
    for place in range(4):
        read = get_args_parser().parse_args(readable("train_tokenizer", [*settings[:place], *typed, *settings[place:]]))
        assert getattr(read, name) == meant
        assert read.overrides == settings


@pytest.mark.parametrize("typed", ["--cfg jobb", "--cfg", "-i=x", "--multirun=2", "-cd", "--experimental-rerun x"])
def test_a_flag_that_is_wrong_is_one_line(typed):
    with pytest.raises(GraincodeError) as error:
        readable("sample", ["seed=1", *typed.split()])
    assert typed.split("=")[0].split()[0] in error.value.line


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("tokenizer/router.ratios=1", "type tokenizer.ratios"),
        ("tokenizer/router.density.sigma=1", "type tokenizer.router.density.sigma"),
        ("trainer..steps=1", "type trainer.steps"),
        ("trainer .steps=1", "type trainer.steps"),
        ("größe=1", "type a key that begins with one of "),
        ("optimizer/lr=1", "type optimizer.lr"),
    ],
)
def test_a_key_that_cannot_be_read_is_an_unknown_one(typed, expected):
    line = refused("train_tokenizer", "tokenizer=dqvae", typed)
    assert line.startswith(f"unknown key {typed.partition('=')[0]!r}: {expected}")


@pytest.mark.parametrize(("job", "key", "meant"), [
    ("sample", "images", "num_samples"), ("evaluate", "num_images", "images.num_samples"),
    ("train_tokenizer", "epochs", "trainer.steps"), ("extract_codes", "bs", "batch_size"),
    ("train_generator", "batch", "trainer.batch_size"), ("sample", "output_dir", "runs_dir"),
    ("sample", "cfg_scale", "sampler.guidance_scale"),
])  # fmt: skip
def test_keys_of_other_programs_are_known(job, key, meant):
    line = refused(job, f"{key}=8")
    assert line == f"unknown key {key!r}: type {meant}=8"


def test_what_they_stand_for_is_there():
    known = "".join(file.read_text("utf-8") for job in JOBS for file in config_directory().rglob("*.yaml"))
    assert all(f"{key.rpartition('.')[2]}:" in known for keys in ELSEWHERE.values() for key in keys)


def test_an_option_of_a_group_that_the_job_lacks():
    assert refused("train_generator", "images=8") == "unknown key 'images': it belongs to evaluate"
    assert refused("sample", "generator/size=8").endswith("it belongs to train_generator")


@pytest.mark.when("a path ends with a space", "it stays")
@pytest.mark.parametrize("name", ["trail ", " lead", "a b ", "tab\t"])
def test_spaces_around_a_text_stay(name):
    assert value("train_tokenizer", "data.root", *FOLDER, f"data.root={name}") == name
    assert value("sample", "runs_dir", f"runs_dir={name}") == name


def test_spaces_around_a_number_do_not_matter():
    assert value("train_tokenizer", "trainer.steps", "trainer.steps= 7 ") == 7


@pytest.mark.when("true is typed for a number", "one line says that a number is expected")
@pytest.mark.parametrize("typed", [
    "seed=true", "trainer.steps=false", "optimizer.lr=true", "tokenizer.ratios=[true,false]", "hardware.workers=true",
    "calibration_images=true", "tokenizer.grains=[[true,8],[4,4]]", "augmentation.shift=true",
])  # fmt: skip
def test_truth_is_no_number(typed):
    key, _, shown = typed.partition("=")
    assert refused("train_tokenizer", typed).startswith(f"{key}={shown}: expected ")


@pytest.mark.when("a mapping is typed where a value is expected", "one line says what is expected")
@pytest.mark.parametrize(("job", "typed"), [
    ("train_generator", "generator.size.width={}"), ("train_tokenizer", "optimizer.lr={a:1}"), ("sample", "seed={}"),
    ("sample", "given.grains={}"), ("train_tokenizer", "+trainer.steps.x=1"), ("extract_codes", "splits={a:1}"),
])  # fmt: skip
def test_a_mapping_is_no_value(job, typed):
    key = typed.lstrip("+").removesuffix(".x=1").partition("=")[0]
    assert refused(job, typed).startswith(f"{key}")


@pytest.mark.when("texts that look like numbers are swept", "each stays as it is typed")
@pytest.mark.parametrize("names", [["007", "008"], ["1e3", "2e3"], ["1_000", "0.50"], ["+5", "x"]])
def test_texts_of_a_sweep_stay(names):
    (_, read) = readable("train_tokenizer", ["-m", f"data.root={','.join(names)}"])
    members = [f"data.root={text}" for text in parse(read).sweep_string_iterator()]
    assert [value("train_tokenizer", "data.root", *FOLDER, member) for member in members] == names


@pytest.mark.parametrize(
    ("key", "numbers"),
    [("optimizer.lr", ["1e-3", "2E-3"]), ("trainer.steps", ["1_000", "2_000"]), ("seed", ["1", "2"])],
)
def test_numbers_of_a_sweep_are_numbers(key, numbers):
    (_, read) = readable("train_tokenizer", ["-m", f"{key}={','.join(numbers)}"])
    members = [f"{key}={text}" for text in parse(read).sweep_string_iterator()]
    assert [value("train_tokenizer", key, member) for member in members] == [float(number) for number in numbers]


@pytest.mark.when("a number begins with 0, or has a colon, as YAML writes base 8 and 60", "one line refuses it")
@pytest.mark.parametrize("typed", ["trainer.steps=0500", "trainer.steps=1:30", "seed=0x10", "trainer.steps=1__0"])
def test_numbers_are_decimal(typed):
    assert refused("train_tokenizer", typed) == f"{typed}: expected a whole number"


def test_null_is_no_text():
    assert value("train_tokenizer", "run_name", "run_name=null") is None


@pytest.mark.parametrize(
    ("key", "text", "number"),
    [
        ("optimizer.lr", "1e-3", 1e-3),
        ("trainer.steps", "500", 500),
        ("tokenizer.ratios", "[0.25,0.75]", [0.25, 0.75]),
        ("tokenizer.objective.pixel", "l1", "l1"),
        ("logging.config", "true", True),
        ("seed", "7", 7),
    ],
)
def test_environment_variables_have_the_type_that_is_expected(key, text, number, monkeypatch):
    monkeypatch.setenv("SETTING", text)
    assert value("train_tokenizer", key, f"{key}=${{oc.env:SETTING}}") == number


def test_environment_variables_of_another_kind_are_refused(monkeypatch):
    monkeypatch.setenv("SETTING", "fast")
    assert refused("train_tokenizer", "optimizer.lr=${oc.env:SETTING}") == "optimizer.lr=fast: expected a number"
    assert refused("train_tokenizer", "optimizer.lr=${oc.env:NONE}").startswith("optimizer.lr: ")


@pytest.mark.when("a setting is typed without =, such as --tokenizer dqvae or seed = 1", "the line says what to type")
@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("--tokenizer dqvae", "tokenizer=dqvae"),
        ("--tokenizer=dqvae", "tokenizer=dqvae"),
        ("--seed 1", "seed=1"),
        ("tokenizer dqvae", "tokenizer=dqvae"),
        ("seed = 1", "seed=1"),
        ("seed =1", "seed=1"),
        ("seed= 1", "seed=1"),
        ("seed: 1", "seed=1"),
        ("tokenizer:dqvae", "tokenizer=dqvae"),
        ("run_name=x --seed 1", "seed=1"),
        ("data=image_folder data.root=my photos", "'data.root=my photos'"),
        ("--steps 10", "trainer.steps"),
        ("+experiment=tok_fashion", "experiment=tok_fashion"),
        ("+tokenizer=dqvae", "tokenizer=dqvae"),
        ("+seed=1", "seed=1"),
        ("=5", "key=value"),
        ("seed=1 =", "key=value"),
    ],
)
def test_what_is_no_override_is_told_as_one(typed, advice):
    line = refused("train_tokenizer", *typed.split())
    assert line.endswith(f"type {advice}")
    if "=" in advice and advice != "key=value":
        check("train_tokenizer", shlex.split(advice))


@pytest.mark.parametrize(
    ("job", "key", "option"),
    [
        ("train_tokenizer", "tokenizer.router", "entropy"),
        ("train_tokenizer", "tokenizer.size", "imagenet"),
        ("train_tokenizer", "tokenizer.adversary", "patch"),
        ("train_tokenizer", "tokenizer.quantizer", "ema"),
        ("train_tokenizer", "tokenizer.perceptual", "lpips"),
        ("train_generator", "generator.size", "small"),
        ("train_generator", "generator.conditioning", "none"),
        ("train_generator", "generator.block", "gpt"),
    ],
)
def test_a_dot_for_a_slash(job, key, option):
    group = key.replace(".", "/")
    assert refused(job, f"{key}={option}") == f"{key}={option}: expected settings; type {group}={option}"


def test_a_network_is_chosen_as_an_option():
    assert refused("evaluate", "features.inception=x").endswith("type features=inception")


@pytest.mark.parametrize(
    ("job", "typed", "advice"),
    [
        ("train_tokenizer", "data.root=/a,b", "'data.root=\"/a,b\"'"),
        ("train_tokenizer", "run_name=a,b", "'run_name=\"a,b\"'"),
        ("extract_codes", "splits=train,val", "splits=[train,val]"),
        ("extract_codes", "ratios=0.5,0.5", "ratios=[0.5,0.5]"),
        ("evaluate", "features=lite0_112,lite0_224", "features=[lite0_112,lite0_224]"),
    ],
)
def test_commas_are_told_by_what_the_key_takes(job, typed, advice):
    more = FOLDER if typed.startswith("data.") else []
    assert f"type {advice} for " in refused(job, *more, typed)
    if not typed.startswith("run_name"):  # which takes no comma
        check(job, [*more, *shlex.split(advice)])


@pytest.mark.when("a number or a list of numbers is typed where an option has a name", "one line names the options")
@pytest.mark.parametrize(("job", "typed", "shown"), [
    ("train_tokenizer", "data=8", "data=8"), ("train_tokenizer", "data=1.5", "data=1.5"),
    ("train_tokenizer", "data=true", "data=true"), ("train_tokenizer", "data=null", "data=null"),
    ("evaluate", "evaluation=[1]", "evaluation=1"), ("evaluate", "features=[1,lite0_112]", "features=1"),
    ("train_tokenizer", "tokenizer/router=7", "tokenizer/router=7"),
])  # fmt: skip
def test_a_number_for_an_option(job, typed, shown):
    assert refused(job, typed).startswith(f"{shown}: expected one of ")


@pytest.mark.parametrize(("typed", "expected"), [
    ("features=}${", "cannot be read: expected ${KEY} or "), ("images.path=${", "images.path: "),
    ("images.path=${x}", "images.path: Interpolation key 'x' not found"), ("images.path=${oc.env:NO}", "images.path: "),
    ("images.path=${images.path}", "images.path: "),
])  # fmt: skip
def test_a_reference_that_cannot_be_followed(typed, expected):
    assert expected in refused("evaluate", "images=folder", typed)


@pytest.mark.parametrize("digits", [400, 5000])
def test_a_number_of_many_digits_is_one_short_line(digits):
    line = refused("train_tokenizer", f"seed={'9' * digits}")
    assert line.startswith("seed=999")
    assert len(line) < 200


def test_words_after_a_list_are_told_once():
    assert refused("extract_codes", "ratios=[0.5,0.5]", "8").count("cannot be read") == 1


def test_options_with_commas_are_a_sweep_s():
    line = refused("train_tokenizer", "tokenizer/adversary=none,patch")
    assert line == "tokenizer/adversary=none,patch: add --multirun for a sweep"


def test_numbers_with_commas_are_a_sweep_s():
    assert refused("train_tokenizer", "tokenizer.codebook_size=8,16").endswith("8,16: add --multirun for a sweep")


def test_a_number_with_commas_in_it():
    assert "type trainer.steps=10000, or add --multirun" in refused("train_tokenizer", "trainer.steps=10,000")
    assert "1000" not in refused("train_tokenizer", "trainer.steps=1,00")


def test_a_list_that_is_not_closed_may_be_text():
    line = refused("train_tokenizer", *FOLDER, "data.root=[xy")
    assert "data.root=[xy cannot be read: type " in line
    typed = shlex.split(line.rpartition("type ")[2])
    assert value("train_tokenizer", "data.root", *FOLDER, *typed) == "[xy"


def test_nothing_named_tilde_is_made(tmp_path, monkeypatch):
    from helpers import command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("graincode.jobs.sample.run", lambda cfg: Path(cfg.runs_dir).mkdir(parents=True) or 1.0)
    command("sample", "runs_dir=~/runs")
    assert sorted(os.listdir(tmp_path)) == ["home"]
    assert (tmp_path / "home" / "runs").is_dir()
