import errno
import hashlib
import json
import math
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from cases import Codes, make_stage
from torch import nn

from graincode.config.errors import nearest
from graincode.config.schema import JOBS, config_directory
from graincode.core.errors import GraincodeError
from graincode.core.losses import Term, weighted_sum
from graincode.core.rng import SampleRng
from graincode.core.schedules import ramp, warmup_cosine
from graincode.data.augmentation import Augmentation, Views
from graincode.data.images import TensorImages
from graincode.data.loader import Schedule, StepSampler, Windows, in_order
from graincode.files import clear_leftovers, new_directory, replacing
from graincode.runs.checkpoint import Checkpoints, read_about, read_state
from graincode.training.meter import Meter
from graincode.training.prepared import parameter_groups
from graincode.training.trackers import LogSettings, RunLog, read_log

CPU = torch.device("cpu")


def test_each_epoch_is_a_permutation_and_any_step_can_be_started_from():
    whole = list(StepSampler(Schedule(size=10, batch_size=4, seed=3), 0, 25))
    stream = [index for batch in whole for index in batch]
    for epoch in range(10):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]
    for start in (1, 7, 24):
        assert list(StepSampler(Schedule(10, 4, 3), start, 25)) == whole[start:]
    assert list(StepSampler(Schedule(10, 4, 4), 0, 25)) != whole


def test_a_batch_larger_than_the_data_set():
    assert len(next(iter(StepSampler(Schedule(3, 7, 0), 0, 1)))) == 7


def joined(ranks, micro_batches):
    """The steps' batches, from the samplers of all processes."""
    rounds = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    return [list(chain(*rounds[i : i + micro_batches])) for i in range(0, len(rounds), micro_batches)]


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 3), (2, 1), (2, 3), (4, 2), (12, 2)])
def test_the_global_batch_does_not_depend_on_how_it_is_divided(processes, micro_batches):
    whole = list(StepSampler(Schedule(17, 24, 5), 2, 6))
    ranks = [StepSampler(Schedule(17, 24, 5, r, processes, micro_batches), 2, 6) for r in range(processes)]
    assert joined(ranks, micro_batches) == whole


LENGTHS = np.random.default_rng(0).integers(16, 65, 500)


def padding(schedule, steps):
    """Share of padded positions in the micro-batches of all processes."""
    parts = [LENGTHS[part] for part in StepSampler(schedule, 0, steps)]
    return 1 - sum(part.sum() for part in parts) / sum(part.max() * len(part) for part in parts)


@pytest.mark.parametrize("window", [2, 5, 16])
def test_windows_hold_what_the_stream_has_there_sorted_by_length(window):
    schedule = Schedule(500, 12, 3, windows=Windows(LENGTHS, window))
    steps = list(StepSampler(schedule, 0, 10 * window))
    for first in range(0, len(steps), window):
        here = [index for step in steps[first : first + window] for index in step]
        assert sorted(here) == sorted(schedule.stream(range(first * 12, (first + window) * 12)))
        lengths = sorted(LENGTHS[step].tolist() for step in steps[first : first + window])
        assert list(chain(*lengths)) == sorted(LENGTHS[here].tolist())
    orders = [np.argsort([LENGTHS[s].sum() for s in steps[f : f + window]]).tolist() for f in (0, window, 2 * window)]
    assert window == 2 or orders[0] != orders[1] != orders[2]
    other = Schedule(500, 12, 4, windows=Windows(LENGTHS, window))
    assert list(StepSampler(other, 0, 10 * window)) != steps


def test_windows_that_divide_an_epoch_hold_each_item_of_it_once():
    schedule = Schedule(500, 10, 3, windows=Windows(LENGTHS, 25))
    stream = list(chain(*StepSampler(schedule, 0, 150)))
    for epoch in range(3):
        assert sorted(stream[epoch * 500 : epoch * 500 + 500]) == list(range(500))
    assert stream[:500] != stream[500:1000]


def test_windows_across_epochs_lose_nothing():
    schedule = Schedule(17, 4, 3, windows=Windows(LENGTHS, 3))
    stream = list(chain(*StepSampler(schedule, 0, 3 * 17)))
    assert sorted(stream) == sorted(list(range(17)) * 12)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 3), (2, 1), (2, 3), (12, 2)])
def test_steps_of_windows_depend_on_nothing_but_seed_and_step(processes, micro_batches):
    windows = Windows(LENGTHS, 8)
    whole = list(StepSampler(Schedule(500, 24, 5, windows=windows), 0, 20))
    assert list(StepSampler(Schedule(500, 24, 5, windows=windows), 11, 13)) == whole[11:13]
    ranks = [StepSampler(Schedule(500, 24, 5, r, processes, micro_batches, windows), 5, 20) for r in range(processes)]
    assert joined(ranks, micro_batches) == whole[5:]
    assert all(LENGTHS[step].tolist() == sorted(LENGTHS[step]) for step in whole)


def test_longer_windows_pad_less():
    shares = [padding(Schedule(500, 16, 0, windows=Windows(LENGTHS, w)), 128) for w in (2, 8, 32)]
    plain = padding(Schedule(500, 16, 0), 128)
    assert plain > 0.3
    assert shares == sorted(shares, reverse=True)
    assert plain > 1.5 * shares[0]
    assert shares[-1] < 0.02


def test_micro_batches_of_sorted_steps_pad_less_and_alike_on_all_processes():
    windows = Windows(LENGTHS, 1)
    assert all(
        sorted(LENGTHS[step]) == LENGTHS[step].tolist() and sorted(step) == sorted(plain)
        for step, plain in zip(
            StepSampler(Schedule(500, 16, 0, windows=windows), 0, 60),
            StepSampler(Schedule(500, 16, 0), 0, 60),
            strict=True,
        )
    )
    one, four = (padding(Schedule(500, 16, 0, micro_batches=m, windows=windows), 128) for m in (1, 4))
    assert four < 0.3 * one
    first, last = (padding(Schedule(500, 32, 0, rank, 2, 4, windows), 128) for rank in (0, 1))
    assert first == pytest.approx(last, abs=0.01)


def test_in_order_gives_everything_once():
    data = torch.arange(10)
    assert torch.equal(torch.cat(list(in_order(data, 4))), data)
    assert torch.equal(torch.cat(list(in_order(data, 4, 6))), data[:6])


def test_learning_rate_rises_then_falls_to_almost_nothing():
    factors = [warmup_cosine(step, 100, 10) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert factors[10 + 45] == pytest.approx(0.5, abs=0.01)


def test_means_of_terms_are_exact_whatever_the_batches():
    meter = Meter()
    values = torch.randn(12)
    for part in (values[:1], values[1:5], values[5:]):
        meter.add({"x": Term(part.sum(), len(part), 2.0)})
    assert meter.flush()["x"] == pytest.approx(float(values.mean()), rel=1e-5)
    assert meter.flush() == {}
    terms = {
        "a": Term(torch.tensor(6.0), 3, 0.5),
        "b": Term(torch.tensor(9.0), 0, 1.0),
        "c": Term(torch.tensor(1.0), 1, 0.0),
    }
    assert float(weighted_sum(terms)) == 10.0


def test_decay_spares_norms_biases_and_embeddings():
    module = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 3))
    decayed, spared = parameter_groups(module)
    assert {id(p) for p in decayed["params"]} == {id(module[1].weight), id(module[3].weight)}
    assert "weight_decay" not in decayed
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) + 2 == len(list(module.parameters()))


def test_checkpoints_keep_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.load(CPU) is None
    for step in (5, 10, 15, 20):
        checkpoints.save(step, {"value": torch.tensor(step)}, identity={"seed": 1})
        if step == 5:
            checkpoints.mark_best(5, {"objective": 1.0})
    assert checkpoints.steps() == [20, 15, 5]
    assert checkpoints.load(CPU)["value"] == 20
    assert read_about(checkpoints.path(5))["identity"] == {"seed": 1}
    checkpoints.mark_best(20, {"objective": 0.5})
    assert checkpoints.steps() == [20, 15]


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"value": torch.full((1000,), float(step))})
    state, about = tmp_path / "step_000000002" / "state.pt", tmp_path / "step_000000002" / "state.json"
    content = bytearray(state.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    elif damage == "flipped bit":
        content[len(content) // 2] ^= 4
    else:
        about.write_text("")
    state.write_bytes(content)
    found = checkpoints.load(CPU)
    assert found["step"] == 1
    assert str(tmp_path / "step_000000002") in caplog.text
    checkpoints.set_aside_after(1)
    assert checkpoints.steps() == [1]
    assert (tmp_path / "damaged_step_000000002").is_dir()


def test_a_state_of_another_version_is_refused_and_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {})
    about = checkpoints.path(2) / "state.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(GraincodeError, match="has state format 3, this version reads 2"):
        checkpoints.load(CPU)
    assert checkpoints.steps() == [2, 1]


def test_a_state_that_is_a_pickle_is_not_run(tmp_path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("a pickle ran",))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {})
    torch.save(Boom(), checkpoints.path(1) / "state.pt")
    about = checkpoints.path(1) / "state.json"
    digest = hashlib.sha256((checkpoints.path(1) / "state.pt").read_bytes()).hexdigest()
    about.write_text(json.dumps(json.loads(about.read_text()) | {"sha256": digest}))
    with pytest.raises(GraincodeError, match="is damaged"):
        read_state(checkpoints.path(1), CPU)


def test_files_are_replaced_as_a_whole_or_not_at_all(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(RuntimeError), replacing(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert target.read_text() == "before"
    with pytest.raises(RuntimeError), new_directory(tmp_path / "folder") as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_resumed_log_has_no_lines_of_steps_that_were_lost(tmp_path):
    settings = LogSettings()
    log = RunLog(tmp_path, 0, True, settings)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": math.sqrt(step)})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    RunLog(tmp_path, 2, True, settings).scalars(3, {"loss": 7.0})
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [(1, 1.0), (2, math.sqrt(2)), (3, 7.0)]


def test_an_evaluation_that_is_done_again_is_logged_once(tmp_path):
    settings = LogSettings()
    for _ in range(2):
        log = RunLog(tmp_path, 0, True, settings)
        log.scalars(2, {"train/loss": 1.0})
        log.scalars(2, {"val/loss": 1.5})
    RunLog(tmp_path, 2, False, settings).scalars(2, {"val/loss": 1.5})
    assert read_log(tmp_path) == [{"step": 2, "train/loss": 1.0}, {"step": 2, "val/loss": 1.5}]


def test_a_meter_goes_on_from_its_state():
    whole, first, second = Meter(), Meter(), Meter()
    for index in range(4):
        terms = {"x": Term(torch.tensor(float(index)), index)}
        seen = {"codebook": torch.bincount(torch.tensor([index, 0]), minlength=5)}
        for meter in (whole, first if index < 2 else second):
            if meter is second and index == 2:
                second.load_state(first.state(), CPU)
            meter.add(terms)
            meter.add_histograms(seen)
    figures = whole.flush()
    assert figures == second.flush()
    assert figures["x"] == 1.0
    assert figures["codebook_usage"] == 0.8


def test_a_ramp_rises_from_nothing_to_the_whole():
    assert [ramp(step, 10, 4) for step in (1, 10, 11, 12, 14, 100)] == [0, 0, 0.25, 0.5, 1, 1]


def test_draws_depend_on_seed_place_and_purpose_alone():
    together = SampleRng(3, torch.arange(100)).uniforms(0, 4, 5)
    assert torch.equal(SampleRng(3, torch.arange(50, 60)).uniforms(0, 4, 5), together[50:60])
    assert not torch.equal(SampleRng(3, torch.arange(100)).uniforms(1, 4, 5), together)
    assert not torch.equal(SampleRng(4, torch.arange(100)).uniforms(0, 4, 5), together)
    many = SampleRng(0, torch.arange(2000)).uniforms(2, 50).flatten()
    assert len(many.unique()) == len(many)
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)
    assert 0 <= many.min() <= many.max() < 1
    assert float(torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1]) == pytest.approx(0, abs=0.02)


def test_views_are_the_image_its_mirror_image_and_shifts_of_both():
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    dataset = TensorImages("made", "train", pixels, torch.arange(5) % 2, ("even", "odd"))
    plain = dataset[range(5)].images
    views = Views(dataset, 4, Augmentation(flip=True, shift=2), seed=7)
    assert len(views) == 20
    made = views[range(20)]
    assert torch.equal(made.labels, torch.arange(5).repeat(4) % 2)
    assert torch.equal(made.labels, views.labels)
    first, mirrored, third, fourth = made.images.split(5)
    assert torch.equal(first, plain)
    assert torch.equal(mirrored, plain.flip(-1))
    inner = [plain[:, :, 2:-2, 2:-2], plain.flip(-1)[:, :, 2:-2, 2:-2]]
    for moved, still in zip((third, fourth), inner, strict=True):
        for image, whole in zip(still, moved, strict=True):
            places = whole.unfold(1, 12, 1).unfold(2, 12, 1)  # the middle of the image is somewhere in its view
            assert int((places == image[:, None, None]).all(-1).all(-1).all(0).sum()) == 1
    assert not torch.equal(third, plain)
    assert torch.equal(views[[13, 2, 19]].images, made.images[[13, 2, 19]])
    assert not torch.equal(Views(dataset, 4, Augmentation(True, 2), seed=8)[range(20)].images, made.images)
    unflipped = Views(dataset, 2, Augmentation(shift=2), 7)[range(10)].images
    assert torch.equal(unflipped[:5], plain)
    assert not torch.equal(unflipped[5:], plain)
    assert not torch.equal(unflipped[5:], third)


def test_augmentation_is_a_function_of_the_place():
    images = torch.randn(64, 3, 6, 8)
    rng = SampleRng(1, torch.arange(64))
    assert Augmentation()(images, rng) is images
    flipped = Augmentation(flip=True)(images, rng)
    mirrored = (flipped != images).flatten(1).any(1)
    assert 16 < int(mirrored.sum()) < 48
    assert torch.equal(flipped[mirrored], images[mirrored].flip(-1))
    shifted = Augmentation(shift=1)(images, rng)
    part = Augmentation(shift=1)(images[10:20], SampleRng(1, torch.arange(10, 20)))
    assert torch.equal(part, shifted[10:20])
    inner = [torch.stack([images[i, :, 1 + a : 5 + a, 1 + b : 7 + b] for a in (-1, 0, 1) for b in (-1, 0, 1)])
             for i in range(64)]  # fmt: skip
    found = [(options == shifted[i, :, 1:5, 1:7]).flatten(1).all(1) for i, options in enumerate(inner)]
    assert all(bool(match.any()) for match in found)
    assert len({int(match.nonzero()[0]) for match in found}) == 9


def test_the_nearest_key_is_suggested():
    assert nearest("codebok", {"codebook", "trainer"}) == "type codebook"
    assert "begins with one of data, trainer" in nearest("zzz", {"data.root", "trainer.steps"})


def test_every_root_config_is_there():
    for job in JOBS:
        assert (config_directory() / f"{job}.yaml").is_file()


def test_leftovers_are_cleared_and_nothing_else(tmp_path):
    with replacing(tmp_path / "figures.json") as partial:
        partial.write_text("{}")
        half = shutil.copy(
            partial, partial.with_name(".figures.partial-abcdefgh.json")
        )  # as if it had been killed here
    (tmp_path / "figures.json").unlink()
    for name in (".export.partial-a1b2c3_d", ".keep", ".my-settings", "best.json", "step_1"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    assert not half.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".keep", ".my-settings", "best.json", "step_1"]


def test_a_full_disk_is_the_user_s_error():
    full = GraincodeError.of_no_room(OSError(errno.ENOSPC, "No space left on device", "log.jsonl"), "sample")
    assert full.line.startswith("no room on the disk for log.jsonl (No space left on device): make room")
    assert GraincodeError.of_no_room(OSError(errno.EACCES, "no"), "sample") is None
    assert GraincodeError.of_no_room(RuntimeError("CUDA error"), "sample") is None


@pytest.mark.parametrize("kind", ["gan", "generator"])
def test_what_is_judged_is_spread_over_the_validation_items(kind, monkeypatch):
    stage, start = make_stage(False, kind)
    start()
    del stage.evaluate
    seen, items = [], Codes if kind == "generator" else TensorImages
    read = items.__getitem__
    monkeypatch.setattr(items, "__getitem__", lambda self, chosen: seen.extend(chosen) or read(self, chosen))
    module = stage.trainables[0].module.eval()
    with torch.no_grad():
        stage.evaluate(module, 12)
        assert len(set(seen)) == 12
        assert min(seen) < 12 <= max(seen)
        stage.evaluate(module, 12, draw=True)
    drawn = seen[24:32]
    assert min(drawn) < 12 <= max(drawn)
