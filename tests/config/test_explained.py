"""What is said of errors."""

import errno

import pytest
import torch
from omegaconf import OmegaConf

from graincode.config.errors import border, nearest
from graincode.config.schema import JOBS, config_directory
from graincode.core.errors import GraincodeError


def test_the_nearest_key_is_suggested():
    assert nearest("codebok", {"codebook", "trainer"}) == "type codebook"
    assert "begins with one of data, trainer" in nearest("zzz", {"data.root", "trainer.steps"})


def test_every_root_config_is_there():
    for job in JOBS:
        assert (config_directory() / f"{job}.yaml").is_file()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "log.jsonl"), "no room on the disk for log.jsonl"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "trainer.batch_size= less"),
    ],
)
def test_no_room_is_the_user_s_error(error, said):
    with pytest.raises(GraincodeError, match=said), border(OmegaConf.create({"trainer": {}})):
        raise error


def test_other_errors_pass():
    with pytest.raises(OSError, match="denied"), border(OmegaConf.create({})):
        raise OSError(errno.EACCES, "denied")
