"""GPUs that jobs of one machine share: faked ones, as only their names and number matter."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from graincode.distributed.gpus import own_gpus, visible_gpus


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("variable", "names"), [
    (None, ["0", "1"]), ("", ["0", "1"]), ("5,3", ["5", "3"]), ("GPU-ab,GPU-cd", ["GPU-ab", "GPU-cd"]),
])  # fmt: skip
def test_visible_gpus_are_named_as_the_system_names_them(variable, names, two, monkeypatch):
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == names


@pytest.mark.when("a sweep has more members than GPUs", "they queue; each records its own in machine.json")
def test_each_job_has_gpus_that_no_other_has_meanwhile(two, tmp_path):
    lock, held, seen, most = threading.Lock(), [], [], [0]

    def work(count):
        with own_gpus(count, tmp_path) as names:
            with lock:
                assert len(names) == count
                assert not set(names) & set(held)
                held.extend(names)
                seen.extend(names)
                most[0] = max(most[0], len(held))
            time.sleep(0.05)
            with lock:
                for name in names:
                    held.remove(name)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, (1, 2, 1, 1, 2)))
    assert len(seen) == 7
    assert most[0] == 2
