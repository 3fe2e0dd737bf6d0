"""Jobs on several processes, whoever starts them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY_GENERATOR, TINY_TOKENIZER, TINY_TRAINER, command, free_ports, result, train_masked
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
LITE0 = "features=lite0_112"
TWO = "hardware.num_processes=2"
LONG = ["trainer.steps=100000", "trainer.eval_every=100000", "trainer.checkpoint_every=20"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(job, *overrides, prefix=("-m",), **environment):
    """A job in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *prefix, f"graincode.jobs.{job}", *overrides], env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, seconds=900):
    """Its exit status, and what it said."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for_step(run, step, seconds=600):
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        log = run / "log.jsonl"
        lines = log.read_text().splitlines() if log.is_file() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.1)
    pytest.fail(f"{run} has not come to step {step}")


def children(pid):
    """Process numbers of the workers that a process started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def close(first, second, limit=1e-3):
    """Whether two exports hold nearly the same weights."""
    a, b = (load_file(run / "export/weights.safetensors") for run in (first, second))
    joined = [torch.cat([w[key].double().flatten() for key in sorted(w)]) for w in (a, b)]
    return float((joined[0] - joined[1]).norm() / joined[0].norm()) < limit


def test_all_jobs_run_on_two_processes_from_one_command(inside):
    base = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, TWO]
    command("train_tokenizer", *base, "run_name=two")
    assert close(Path("runs/train_tokenizer/two"), Path("runs/train_tokenizer/tok"), 0.05)
    tokenizer = "tokenizer_path=runs/train_tokenizer/tok/export"
    views = ["views=3", "augmentation.flip=true", "augmentation.shift=2", "batch_size=4"]
    command("extract_codes", *inside, tokenizer, TWO, *views, "run_name=two")
    command("extract_codes", *inside, tokenizer, *views, "run_name=one")
    for split in ("train", "val", "test"):
        for name in ("grains", "indices", "labels"):
            one, two = (Path(f"runs/extract_codes/{r}/codes/{split}.{name}.npy").read_bytes() for r in ("one", "two"))
            assert one == two
    codes = "codes_path=runs/extract_codes/codes/codes"
    command("train_generator", *TINY_GENERATOR, *TINY_TRAINER, codes, TWO, "run_name=two")
    assert close(Path("runs/train_generator/two"), Path("runs/train_generator/ar"))
    pair = [tokenizer, "generator_path=runs/train_generator/ar/export"]
    masked = [tokenizer, f"generator_path={train_masked('class')}/export", "sampler=masked"]
    for run, more in (("three", [TWO]), ("four", [])):
        command("sample", *pair, "num_samples=7", "batch_size=2", f"run_name={run}", *more)
        command("sample", *masked, "num_samples=7", "batch_size=2", f"run_name=masked-{run}", *more)
        settings = ["images.num_samples=7", "batch_size=2", "keep=npz"]
        command("evaluate", *inside, LITE0, *pair, *settings, f"run_name=gen-{run}", *more)
        command("evaluate", *inside, LITE0, tokenizer, "evaluation=reconstruction", f"run_name=rec-{run}", *more)
    for kind in ("", "masked-"):
        one, two = (Path(f"runs/sample/{kind}{run}/samples.npz").read_bytes() for run in ("four", "three"))
        assert one == two
    for kind in ("gen", "rec"):
        three, four = (
            json.loads(Path(f"runs/evaluate/{kind}-{r}/metrics.json").read_text()) for r in ("three", "four")
        )
        assert three["count"] == four["count"]
        assert three["metrics"] == pytest.approx(four["metrics"], rel=1e-4)
    kept = [Path(f"runs/evaluate/gen-{r}/images.npz").read_bytes() for r in ("three", "four")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_other_launchers(launcher, inside):
    prefix = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"],
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"],
    }[launcher]  # fmt: skip
    arguments = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, f"run_name={launcher}"]
    status, _, err = finish(start("train_tokenizer", *arguments, prefix=prefix))
    assert status == 0, err
    assert close(Path(f"runs/train_tokenizer/{launcher}"), Path("runs/train_tokenizer/tok"), 0.05)


def test_a_sweep_by_slurm_s_launcher_on_this_machine(inside):
    """submitit's local executor stands in for SLURM; the jobs that it starts start the processes."""
    arguments = ["--multirun", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hardware=slurm"]
    arguments += ["hardware.device=cpu", "hardware.mixed_precision='no'", TWO, "hardware.workers=0", "trainer.steps=2"]
    swept = ["tokenizer.codebook_size=16,24", "run_name=swept-${tokenizer.codebook_size}"]
    status, _, err = finish(
        start("train_tokenizer", *arguments[:2], *inside, *TINY_TOKENIZER[:2], *TINY_TRAINER, *arguments[2:], *swept)
    )
    assert status == 0, err
    tables = [file.read_text() for file in Path("runs/sweeps/train_tokenizer").glob("*/table.csv")]
    assert any("tokenizer.codebook_size" in table and table.count("\n") == 3 for table in tables)
    assert all(result(Path(f"runs/train_tokenizer/swept-{size}"))["objective"] > 0 for size in (16, 24))


def test_two_machines(inside):
    """Both "machines" are this one."""
    nodes = ["hardware.num_nodes=2", "hardware.main_address=127.0.0.1", f"hardware.main_port={free_ports()}"]
    arguments = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, *nodes]
    both = [start("train_tokenizer", *arguments, "run_name=nodes", f"hardware.node_rank={n}") for n in (0, 1)]
    for process in both:
        status, _, err = finish(process)
        assert status == 0, err
    assert close(Path("runs/train_tokenizer/nodes"), Path("runs/train_tokenizer/tok"), 0.05)


def test_a_signal_to_the_command_stops_all_processes_with_a_state(inside):
    number, run = signal.SIGTERM, Path("runs/train_tokenizer/two-signalled")
    more = [f"run_name={run.name}", "hardware.workers=1"]
    process = start("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, *LONG, TWO, *more)
    wait_for_step(run, 4)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == 75, err
    last = err.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name} after step ")
    assert (run / f"state/step_{int(last.split()[5].rstrip(',')):09d}").is_dir()


def test_a_signal_to_all_processes_of_a_run_spares_those_that_load_its_data(inside):
    """As a terminal's Ctrl-C and SLURM send it."""
    run = Path("runs/train_tokenizer/group")
    more = [f"run_name={run.name}", "hardware.workers=2", "trainer.eval_every=3"]
    process = start("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, *LONG[::2], *more)
    wait_for_step(run, 4)
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGTERM)
    status, _, err = finish(process)
    assert status == 75, err
    assert "Traceback" not in err


@pytest.mark.when(
    "SIGTERM comes while a process that loads data is stopped", "the run ends within half a minute, its state saved"
)
def test_a_signal_is_obeyed_while_no_data_come(inside):
    run = Path("runs/train_tokenizer/stalled")
    more = [f"run_name={run.name}", "hardware.workers=1"]
    process = start("train_tokenizer", *inside, *TINY_TOKENIZER, *TINY_TRAINER, *LONG, *more)
    wait_for_step(run, 4)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process, 120)
    assert status == 75, err
    step = int(err.splitlines()[-1].split()[5].rstrip(","))
    assert (run / f"state/step_{step:09d}").is_dir()
    assert step % 20  # saved for the signal


@pytest.mark.when("the terminal of a training is closed", "it finishes the step and saves its state")
def test_a_training_whose_terminal_is_closed_saves_its_state(inside):
    run = Path("runs/train_tokenizer/hangup")
    arguments = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, *LONG, f"run_name={run.name}"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "graincode.jobs.train_tokenizer", *arguments], ENVIRONMENT)
    is_over = threading.Event()

    def read():
        while not is_over.is_set():
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 4096)

    reader = threading.Thread(target=read)
    reader.start()
    wait_for_step(run, 4)
    is_over.set()
    reader.join()
    os.kill(pid, signal.SIGSTOP)  # so that it writes nothing between the end of its terminal and the signal
    os.close(terminal)
    os.kill(pid, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert list((run / "state").glob("step_*"))


def test_an_error_of_the_user_is_one_line_from_many_processes(inside):
    arguments = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, TWO, "run_name=tok", "optimizer.lr=0.7"]
    status, _, err = finish(start("train_tokenizer", *arguments))
    assert status == 2
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert "holds a run with other settings (optimizer.lr: " in lines[0]


def test_processes_started_with_different_settings_refuse_to_go_on(inside):
    port = str(free_ports())
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = [*inside, *TINY_TOKENIZER, *TINY_TRAINER, "run_name=differ"]
    both = [start("train_tokenizer", *arguments, f"seed={n}", RANK=str(n), LOCAL_RANK=str(n), **shared) for n in (0, 1)]
    for process in both:
        status, _, err = finish(process)
        assert status == 2
        assert "the 2 processes differ in their configuration" in err
