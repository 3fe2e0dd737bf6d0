"""The command line answers before anything heavy is imported, and shows what a job itself has."""

import os
import subprocess
import sys

import pytest

from graincode.config.schema import JOBS
from graincode.jobs import cli

SHOW = """
import contextlib, runpy, sys

sys.argv = sys.argv[1:]
with contextlib.suppress(SystemExit):
    runpy.run_module(f"graincode.jobs.{sys.argv[0]}", run_name="__main__")
heavy = {"torch", "matplotlib", "timm", "accelerate"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


def shown(job, *flags, cwd=None):
    done = subprocess.run([sys.executable, "-c", SHOW, job, *flags], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("job", "has", "lacks"), [
    ("train_tokenizer", "tokenizer/router: ", "generator/"), ("extract_codes", "data: ", "optimizer"),
    ("train_generator", "generator/size: ", "tokenizer/"), ("sample", "sampler: ", "optimizer"),
    ("evaluate", "reference: ", "optimizer"),
])  # fmt: skip
def test_help_shows_a_job_s_own_groups_without_importing_torch(job, has, lacks, tmp_path):
    said = shown(job, "--help", cwd=tmp_path)
    groups = said.partition("== Keys ==")[0]
    assert said.startswith(f"graincode-{job.replace('_', '-')} ")
    assert has in groups
    assert lacks not in groups
    assert not list(tmp_path.iterdir())


def test_help_does_not_have_hydra_list_all_groups(tmp_path):
    stop = "from hydra._internal.config_loader_impl import ConfigLoaderImpl as C; del C.get_group_options; "
    done = subprocess.run(
        [sys.executable, "-c", f"{stop}from graincode.config.job import job_main; job_main('evaluate')", "--help"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "reference: " in done.stdout


def test_a_configuration_is_shown_from_any_directory_without_importing_torch(tmp_path):
    assert "codebook_size: 64" in shown("train_tokenizer", "tokenizer.codebook_size=64", "--cfg", "job", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_job_has_a_console_script():
    assert all(getattr(cli, job).args == (job,) for job in JOBS)


@pytest.mark.when("what reads a command's output ends, as `head` does", "the command ends without a traceback")
@pytest.mark.parametrize("flag", ["--help", "--cfg=job"])
def test_output_that_nobody_reads_ends_a_command_quietly(flag):
    code = "import sys; from graincode.config.job import job_main; job_main('evaluate')"
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run([sys.executable, "-c", code, flag], stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")
