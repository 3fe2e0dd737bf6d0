"""Bad input ends with status 2 and one line that says what to type."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, refusal, refused, write_images
from helpers_advice import advised, follow

SHORT = [*TINY_TOKENIZER, *TINY_TRAINER]


@pytest.mark.parametrize(
    ("job", "overrides", "expected"),
    [
        ("train_tokenizer", ["tokenizer.codebok_size=64"], "type tokenizer.codebook_size"),
        ("train_tokenizer", ["trainer.stepz=6"], "type trainer.steps"),
        ("train_tokenizer", ["codebook_size=6"], "type tokenizer.codebook_size"),
        ("train_tokenizer", ["+tokenizer.size.chanels=8"], "type tokenizer.size.channels"),
        ("train_tokenizer", ["tokeniser=dqvae_pp"], "type tokenizer"),
        ("train_tokenizer", ["data=mnist"], "data=mnist: expected one of cifar10, fashion_mnist, "),
        ("train_tokenizer", ["tokenizer/router=entropie"], "tokenizer/router=entropie: expected one of "),
        ("train_generator", ["generator=dgit_nr"], "generator=dgit_nr: expected one of dgit_ar, dgit_nar, gpt"),
        ("train_tokenizer", ["tokenizer.codebook_size=many"], "tokenizer.codebook_size=many: expected a whole number"),
        ("train_tokenizer", ["tokenizer=dqvae", "tokenizer.router.density.sigma=wide"], "sigma=wide: expected a num"),
        ("train_tokenizer", ["tokenizer.model.decoder.expand=7"], "expand=7: expected true or false"),
        ("train_tokenizer", ["tokenizer.objective.pixel=l3"], "tokenizer.objective.pixel=l3: expected one of l1, l2"),
        ("train_tokenizer", ["trainer.steps=ten"], "trainer.steps=ten: expected a whole number"),
        ("train_tokenizer", ["trainer.steps=0"], "trainer.steps=0: expected 1 or more"),
        ("train_tokenizer", ["+foo=1"], "unknown key 'foo'"),
        ("train_tokenizer", ["trainer.lr=1e-3"], "unknown key 'trainer.lr': type optimizer.lr"),
        ("train_tokenizer", ["lr=1e-3"], "unknown key 'lr': type optimizer.lr"),
        ("train_tokenizer", ["trainer=5"], "trainer=5: expected one of "),
        ("sample", ["experiment=tok_fashion"], "experiment=tok_fashion is not for sample"),
        ("sample", ["given.grains=[1"], "given.grains=[1 cannot be read"),
        ("sample", ["sampler.steps=8"], "unknown key 'sampler.steps': type sampler=masked too"),
        ("train_generator", ["generator.masking.beta=2"], "type generator=dgit_nar too"),
        ("train_tokenizer", ["tokenizer.adversary.weight=2"], "type tokenizer/adversary=patch too"),
        ("train_tokenizer", ["logging.config=maybe"], "logging.config=maybe: expected true or false"),
        ("train_tokenizer", ["debug.dry=perhaps"], "debug.dry=perhaps: expected true or false"),
        ("train_tokenizer", ["hardware.mixed_precision=fp8"], "mixed_precision=fp8: expected one of no, fp16, bf16"),
        ("train_tokenizer", ["hardware.mixed_precision=fp16"], "hardware.mixed_precision=fp16: expected bf16"),
        ("train_tokenizer", ["hardware=multi_node"], "hardware.num_nodes=null: expected a number"),
        ("train_tokenizer", ["hardware.num_processes=0"], "hardware.num_processes=0: expected 1 to 1024"),
        ("train_tokenizer", ["hardware.workers=-1"], "hardware.workers=-1: expected 0 to 1024"),
        ("train_tokenizer", ["hardware.threads=-1"], "hardware.threads=-1: expected 1 to 1024, or null"),
        ("train_tokenizer", ["trainer.warmup_steps=-1"], "trainer.warmup_steps=-1: expected 0 or more"),
        ("train_tokenizer", ["trainer.clip_grad_norm=-1"], "trainer.clip_grad_norm=-1: expected 0 or more"),
        ("train_tokenizer", ["optimizer.lr=-1"], "optimizer.lr=-1 "),
        ("train_tokenizer", ["optimizer.betas=[2,2]"], "optimizer.betas=[2,2] "),
        ("train_tokenizer", ["optimizer=adamw", "optimizer.weight_decay=-1"], "optimizer.weight_decay=-1 "),
        ("train_tokenizer", ["tokenizer/router=entropy", "tokenizer.router.density.bins=0"], "density.bins=0: exp"),
        ("train_tokenizer", ["tokenizer/router=entropy", "tokenizer.router.density.sigma=-1"], "density.sigma=-1: ex"),
        ("train_tokenizer", ["runs_dir=/proc/nope"], "runs_dir=/proc/nope: expected a directory to write to"),
        ("train_tokenizer", ["hardware.gradient_accumulation=3"], "trainer.batch_size=16: expected a multiple of 3"),
        ("train_tokenizer", ["hardware.num_nodes=2", "hardware.node_rank=2"], "hardware.node_rank=2: expected 0 to "),
        ("train_tokenizer", ["trainer.ema_decay=1"], "trainer.ema_decay=1: expected 0"),
        ("train_tokenizer", ["trainer.export=newest"], "trainer.export=newest: expected one of last, best"),
        ("train_tokenizer", ["trainer.resume=/nowhere"], "trainer.resume=/nowhere: expected auto, never or a state"),
        ("train_tokenizer", ["trainer.resume=/tmp"], "trainer.resume=/tmp: expected auto, never or a state"),
        ("train_tokenizer", ["init_from=/nowhere"], "no export"),
        ("train_tokenizer", ["augmentation.shift=-1"], "augmentation.shift=-1: expected 0 or more"),
        ("train_tokenizer", ["tokenizer/adversary=patch", "hardware.strategy=fsdp"], "strategy=fsdp: expected ddp"),
        ("train_tokenizer", ["tokenizer/adversary=patch", "tokenizer.adversary.weight=-1"], "expected 0 or more"),
        ("train_tokenizer", ["tokenizer/adversary=patch", "trainer.steps=900"], "adversary.start_step=10000: "),
        ("train_tokenizer", ["tokenizer/adversary=patch", "tokenizer.adversary.start_step=0",
                             "tokenizer.adversary.discriminator.layers=4"], "discriminator.layers=4: expected fewer"),
        ("train_tokenizer", ["tokenizer/perceptual=vgg"], "tokenizer/perceptual=vgg: expected one of lite0, "),
        ("train_tokenizer", ["tokenizer/perceptual=lpips", "tokenizer.perceptual.weights=/no.pth"], "/no.pth: no such"),
        ("train_tokenizer", ["tokenizer.quantizer.max_restarts=5"], "quantizer.max_restarts=5: expected 0 to 1"),
        ("train_tokenizer", ["tokenizer.size.patch=8"], "tokenizer.size.patch="),
        ("train_tokenizer", ["tokenizer.objective.commitment=-1"], "objective.commitment=-1: expected 0 or more"),
        ("train_tokenizer", ["tokenizer.size.blocks=0"], "tokenizer.size.blocks=0"),
        ("train_tokenizer", ["tokenizer.size.multipliers=[]"], "tokenizer.size.multipliers=[]"),
        ("train_tokenizer", ["tokenizer.code_dim=0"], "tokenizer.code_dim=0: expected 1 or more"),
        ("train_tokenizer", ["run_name=latest"], "run_name=latest"),
        ("train_tokenizer", ["tokenizer.ratios=half"], "tokenizer.ratios=half: expected a list of numbers"),
        ("evaluate", ["images.num_samples=many"], "images.num_samples=many: expected a whole number"),
        ("evaluate", ["images.num_samples=0"], "images.num_samples=0: expected 1 or more"),
        ("evaluate", ["reference.split=all"], "reference.split=all: expected one of train, val, test"),
        ("evaluate", ["images.labels=even"], "images.labels=even: expected one of balanced, drawn, reference"),
        ("evaluate", ["evaluation.metrics=[fd,fad]"], "expected a list of some of fd, sfd, is, kid, "),
        ("evaluate", ["evaluation.metrics=[]"], "evaluation.metrics=[]: expected null"),
        ("evaluate", ["features=resnet"], "expected one of clip, dinov2, inception, lite0_112, lite0_224, timm"),
        ("evaluate", ["features=null"], "features=null: expected one of clip, dinov2, inception, "),
        ("evaluate", ["evaluation.inception_splits=0"], "evaluation.inception_splits=0: expected 1 or more"),
        ("evaluate", ["evaluation.precision_neighbours=0"], "precision_neighbours=0: expected 1 or more"),
        ("evaluate", ["seed=144115188075855872"], "expected 0 or more, below 2^57"),
        ("evaluate", ["keep=jpeg"], "keep=jpeg: expected one of png, npz, null"),
        ("evaluate", ["reference=statistics"], "reference.path is not set: type reference.path="),
        ("evaluate", ["images=reconstructions"], "images=reconstructions: expected samples, split or folder"),
        ("evaluate", ["images=folder", "images.path=/nowhere"], "images.path=/nowhere: expected a path"),
        ("evaluate", ["reference=statistics", "reference.path=/no.npz"], "reference.path=/no.npz: expected a path"),
        ("train_tokenizer", ["seed=-1"], "seed=-1: expected 0 or more"),
        ("extract_codes", ["splits=[dev]"], "splits=[dev]: expected a list of some of train, val, test"),
        ("train_tokenizer", ["optimizer.lr=fast"], "optimizer.lr=fast: expected a number"),
        ("train_tokenizer", ["data=image_folder"], "data.root=null: expected"),
        ("train_tokenizer", ["data=image_folder", "data.root=/nowhere/at/all"], "nowhere/at/all: no such folder"),
        ("train_tokenizer", ["tokenizer.ratios=[0.5,0.6]"], "tokenizer.ratios=[0.5,0.6]: expected 2 shares"),
        ("train_tokenizer", ["tokenizer.grains=[[4,4],[8,8]]"], "tokenizer.grains=[[4,4],[8,8]]: "),
        ("train_tokenizer", ["tokenizer.grains=[[12,12],[4,4]]"], "grains=[[12,12],[4,4]]: expected pairs that divide"),
        ("train_tokenizer", ["hardware=gpu"], "hardware.device=gpu: expected cpu"),
        ("extract_codes", ["views=0"], "views=0: expected 1 or more"),
        ("extract_codes", ["views=2"], "views=2 augmentation.flip=false augmentation.shift=0: expected 1"),
        ("extract_codes", ["views=3", "augmentation.flip=true"], "augmentation.shift=0: expected 2"),
        ("extract_codes", ["augmentation.shift=2"], "augmentation.shift=2: expected 2 views"),
        ("extract_codes", ["views=2", "augmentation.flip=true", "splits=[val]"], "splits=[val]: expected train"),
        ("extract_codes", ["augmentation.flop=true"], "type augmentation.flip"),
        ("train_generator", ["trainer.bucketing_window=0"], "trainer.bucketing_window=0: expected 1 or more"),
        ("train_tokenizer", ["trainer.bucketing_window=8"], "unknown key 'trainer.bucketing_window'"),
        ("extract_codes", [], "tokenizer_path=latest: expected a train_tokenizer run"),
        ("train_tokenizer", ["router=entropy"], "unknown key 'router': type tokenizer/router=entropy"),
        ("train_tokenizer", ["tokenizer.router=entropy"], "tokenizer.router=entropy: expected settings; type "),
        ("train_generator", ["generator.block=gpt"], "type generator/block=gpt"),
        ("train_tokenizer", ["generator=dgit_nar"], "unknown key 'generator': it belongs to train_generator"),
        ("sample", ["keep=png"], "unknown key 'keep': it belongs to evaluate"),
        ("train_tokenizer", ["tokenizer.router.sigma=0.1"], "type tokenizer.router.density.sigma"),
        ("train_tokenizer", ["tokenizer.router.density._target_=my.Density"], "_target_=my.Density: expected a class"),
        ("train_tokenizer", ["tokenizer.router._target_=graincode.tokenizer.No"], "tokenizer.router._target_=grain"),
        ("train_tokenizer", ["tokenizer.model.layout.codebook_size=3"], "type tokenizer.codebook_size"),
        ("train_tokenizer", ["tokenizer.model.encoder.code_dim=3"], "type tokenizer.code_dim"),
        ("train_tokenizer", ["tokenizer.codebook_size=8,16"], "codebook_size=8,16: add --multirun for a sweep"),
        ("train_tokenizer", ["experiment=ar_fashion"], "no generator: expected one of tok_fashion, "),
        ("train_tokenizer", ["=5"], "=5 cannot be read: type key=value"),
        ("train_tokenizer", ["~trainer"], "trainer is not set"),
        ("evaluate", ["features=[]"], "features is not set"),
        ("evaluate", ["features=[nosuch]"], "features=nosuch: expected one of clip, dinov2, inception, "),
        ("sample", ["classes=7"], "classes=7: expected a list such as [7]"),
        ("sample", ["classes=food"], "classes=food: expected a list such as [food]"),
        ("sample", ["generator_path=/nowhere"], "generator_path=/nowhere: expected latest or a path"),
    ],
)  # fmt: skip
def test_wrong_arguments_name_their_key(job, overrides, expected, tmp_path, monkeypatch):
    import torch

    if overrides == ["hardware=gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    line = refused(job, *overrides)
    assert expected in line
    follow(job, line, overrides)


@pytest.mark.parametrize(("line", "overrides", "again"), [
    ("unknown key 'lr': type optimizer.lr", ["lr=1"], [["optimizer.lr=1"]]),
    ("unknown key 'a.b': type c=d or e=f too, which has it", ["a.b=1"], [["a.b=1", "c=d"], ["a.b=1", "e=f"]]),
    ("data=x: expected one of a, b, c", ["seed=1", "data=x"], [["seed=1", "data=a"], ["seed=1", "data=b"]]),
    ("x=1,2: type x=[1,2] for a list, or add --multirun for a sweep", ["x=1,2"], [["x=[1,2]"]]),
    ("seed 1 cannot be read: type seed=1", ["seed"], [["seed=1"]]), ("x=0: expected 1 or more", ["x=0"], []),
])  # fmt: skip
def test_what_a_line_says_to_type_is_found(line, overrides, again):
    assert advised(line, overrides) == again


@pytest.mark.parametrize(("overrides", "again"), [
    (["lr=1e-3"], ["optimizer.weight_decay=1"]), (["trainer.steps=ten"], ["trainer.steps=five"]),
])  # fmt: skip
def test_advice_that_is_not_accepted_is_noticed(overrides, again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=again[0]):
        follow("train_tokenizer", f"{overrides[0]}: type {again[0]}", overrides)


def test_groups_of_other_jobs_are_not_offered():
    for key in ("foo", "optimizer.lr", "tokenizer/router"):
        assert not re.search(r"optimizer|tokenizer/|generator/|data", refused("sample", f"{key}=1").partition(": ")[2])


@pytest.mark.parametrize(
    "override", ["trainer.lr=1", "data=mnist", "trainer.steps=ten", "trainer.steps=0", "tokenizer.size.patch=8"]
)
def test_a_command_ends_with_one_line_and_status_2(override, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert override.split(".")[0] in refusal(capsys, "train_tokenizer", override)


@pytest.mark.parametrize(("job", "less"), [
    ("train_generator", "a smaller trainer.batch_size, hardware.gradient_checkpointing=true or a larger hardware.grad"),
    ("extract_codes", "a smaller batch_size"), ("sample", "a smaller batch_size, or for samples precision=bfloat16"),
])  # fmt: skip
def test_a_gpu_without_memory(job, less, capsys, tmp_path, monkeypatch):
    import torch

    def run(cfg):
        told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which ..."
        raise torch.OutOfMemoryError(told)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"graincode.jobs.{job}.run", run)
    line = refusal(capsys, job)
    assert line.startswith(f"error: CUDA out of memory. Tried to allocate 2.00 GiB: give {less}")


@pytest.mark.when("runs_dir of a sweep cannot be written to", "one line names the place")
def test_a_sweep_without_a_place_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    line = refusal(capsys, "train_tokenizer", "--multirun", "runs_dir=file", "seed=0,1")
    assert line.startswith("error: file/sweeps")
    assert "runs_dir=" in line


def test_a_directory_without_images(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    line = refusal(capsys, "train_tokenizer", *SHORT, "data=image_folder", "data.root=empty", "data.image_size=32")
    assert "data.root=" in line
    assert "/empty: expected images" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image(workers, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "images")
    for path in images.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    line = refusal(
        capsys, "train_tokenizer", *SHORT, "data=image_folder", "data.root=images", "data.image_size=32",
        f"hardware.workers={workers}",
    )  # fmt: skip
    assert ".png cannot be read as an image" in line


def test_an_export_that_is_none_and_one_of_the_other_kind(inside, capsys):
    line = refusal(capsys, "sample", "generator_path=images")
    assert "no export" in line
    assert "error: generator_path=" in line
    line = refusal(capsys, "sample", "generator_path=runs/train_tokenizer/tok/export")
    assert "expected a generator" in line


def test_a_generator_and_a_tokenizer_that_do_not_fit(inside, capsys):
    generator = "generator_path=runs/train_generator/ar/export"
    for settings, expected in (
        (["tokenizer.codebook_size=16"], "codebook_size 32 instead of 16"),
        (["seed=1"], "trained on codes of tokenizer"),
    ):
        name = f"run_name=other-{settings[0].split('=')[0]}"
        if not Path(f"runs/train_tokenizer/{name.split('=')[1]}").exists():
            command("train_tokenizer", *inside, *SHORT, "trainer.steps=1", *settings, name)
        capsys.readouterr()
        other = f"tokenizer_path=runs/train_tokenizer/{name.split('=')[1]}/export"
        line = refusal(capsys, "sample", generator, other)
        assert expected in line


def test_images_of_another_size_than_the_tokenizer_s(inside, capsys):
    tokenizer = "tokenizer_path=runs/train_tokenizer/tok/export"
    line = refusal(capsys, "extract_codes", *inside, "data.image_size=48", tokenizer)
    assert "data.image_size=[48,48]: expected [32,32]" in line


def test_a_run_directory_with_other_settings_is_left_alone(inside, capsys):
    line = refusal(capsys, "train_tokenizer", *inside, *SHORT, "optimizer.lr=0.5", "run_name=tok")
    assert "optimizer.lr: " in line
    assert "another run_name" in line


def test_a_state_of_a_run_with_other_settings_is_refused(inside, capsys):
    state = "trainer.resume=runs/train_tokenizer/tok/state/step_000000006"
    line = refusal(capsys, "train_tokenizer", *inside, *SHORT, state, "optimizer.lr=0.5", "run_name=mixed")
    assert "optimizer.lr: " in line
    assert "trainer.resume=" in line


def test_a_run_that_must_not_resume_leaves_what_is_there(inside, capsys):
    folder = Path("runs/train_tokenizer/never")
    command("train_tokenizer", *inside, *SHORT, "run_name=never")
    (folder / "result.json").unlink()
    line = refusal(capsys, "train_tokenizer", *inside, *SHORT, "trainer.resume=never", "run_name=never")
    assert "has states up to step 6" in line


def test_weights_of_another_architecture_are_refused(inside, capsys):
    start = "init_from=runs/train_tokenizer/tok/export"
    line = refusal(capsys, "train_tokenizer", *inside, *SHORT, start, "tokenizer.size.channels=16", "run_name=wide")
    assert "built otherwise than this tokenizer" in line


def test_a_directory_that_another_process_holds(inside, capsys, monkeypatch):
    import fcntl

    monkeypatch.setattr("graincode.runs.run._LOCK_SECONDS", 0.5)

    folder = Path("runs/train_tokenizer/held")
    folder.mkdir(parents=True)
    with (folder / "run.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refusal(capsys, "train_tokenizer", *inside, *SHORT, "run_name=held")
    assert "another process works in" in line
    shutil.rmtree(folder)


def test_a_generator_without_a_width(inside):
    line = refused(
        "train_generator", *TINY_GENERATOR, "codes_path=runs/extract_codes/codes/codes", "generator.size.width=0"
    )
    assert line.startswith("generator.size.width=0: expected 1 or more")


def test_codes_that_are_none(inside, capsys):
    line = refusal(capsys, "train_generator", *TINY_GENERATOR, "codes_path=images")
    assert "error: codes_path=" in line


def test_a_loss_that_is_not_finite_stops_the_run(inside, capsys):
    line = refusal(capsys, "train_tokenizer", *inside, *SHORT, "optimizer.lr=1e30", "run_name=blown")
    assert "not finite at step" in line
    assert "nonfinite.json" in line
    run = Path("runs/train_tokenizer/blown")
    assert not (run / "export").exists()
    dump = json.loads((run / "nonfinite.json").read_text())
    assert f"{dump['term']} is not finite at step {dump['step']}" in line
    assert len(dump["images"]) == 4
    assert dump["weights_not_finite"]
    assert dump["last_good_step"] == 0
    assert any(value in ("nan", "inf") for _, _, value in dump["values"])
