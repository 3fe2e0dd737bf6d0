"""Collectives of one process and of several."""

import subprocess
import sys

import pytest
import torch

from graincode.distributed import collectives

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


DISAGREE = """
import sys
import torch.distributed as dist
from graincode.distributed import collectives
from graincode.core.errors import GraincodeError

dist.init_process_group("gloo")
collectives.check_agreement("their count", dist.get_world_size())
assert collectives.count() == 2
try:
    collectives.check_agreement("their rank", dist.get_rank())
except GraincodeError as error:
    sys.exit("the 2 processes differ in their rank" not in str(error) or dist.is_initialized())
sys.exit(2)
"""


@pytest.mark.slow
def test_processes_that_disagree_leave_together(tmp_path):
    """One that ended while another still shared something with it could abort that."""
    (tmp_path / "disagree.py").write_text(DISAGREE)
    done = subprocess.run([*TORCHRUN, str(tmp_path / "disagree.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def test_one_process_alone_needs_no_others():
    rows = torch.arange(3)
    assert collectives.gather_rows(rows) is rows
    assert collectives.sum_(rows) is rows
    assert collectives.on_main(lambda: 5) == 5
    assert list(collectives.items(7)) == list(range(7))
    with pytest.raises(ZeroDivisionError):
        collectives.on_main(lambda: 1 / 0)
