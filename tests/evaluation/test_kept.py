"""Images that an evaluation keeps are checked when it is asked for again."""

import numpy as np
import pytest
import torch
from helpers_files import to_directory, to_pipe

from graincode.core.errors import Damaged
from graincode.data import TensorImages
from graincode.evaluation.record import check_kept, keep_images
from graincode.evaluation.streams import DatasetStream

DAMAGES = {
    "gone": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-30]),
    "a directory": to_directory,
    "a pipe": to_pipe,
}


@pytest.mark.when(
    "kept images of a finished evaluation are cut, or some are gone", "the same evaluation writes them again"
)
@pytest.mark.parametrize(("form", "name"), [("png", "images/000002.png"), ("npz", "images.npz")])
@pytest.mark.parametrize("damage", DAMAGES)
def test_kept_images_that_are_not_whole_are_noticed(tmp_path, form, name, damage):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8)).astype(np.uint8))
    stream = DatasetStream(TensorImages("made", "test", pixels, torch.zeros(4).long()), 2, 0)
    list(keep_images(stream, tmp_path, form))
    check_kept(tmp_path, 4, form)
    check_kept(tmp_path, 4, None)
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(Damaged) as error:
        check_kept(tmp_path, 4, form)
    assert str(error.value).startswith(f"{tmp_path / name} is damaged")
