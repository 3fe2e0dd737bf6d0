"""Locks, with and without those of a file system."""

import errno
import os
import subprocess
import sys

import filelock
import pytest

from graincode import locks
from graincode.locks import locked


@pytest.mark.when(
    "a network disk has no locks", "files stand for them, with one warning; one that a killed process left is told"
)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_without_locks_of_the_file_system_files_stand_for_them(tmp_path, monkeypatch, caplog, number):
    caplog.set_level("WARNING")  # whatever a job has set before

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    locks._warn_of_soft_locks.cache_clear()
    for _ in range(2):
        with locked(tmp_path / "run.lock"), pytest.raises(filelock.Timeout), locked(tmp_path / "run.lock", 0.2):
            raise AssertionError
    assert len(caplog.messages) == 1
    assert os.strerror(number) in caplog.messages[0]
    soft = f"filelock.SoftFileLock({str(tmp_path / 'run.lock.owner')!r})"
    code = f"import filelock, os; lock = {soft}; lock.acquire(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code])
    assert (tmp_path / "run.lock.owner").exists()
    with locked(tmp_path / "run.lock", 5):
        pass


def test_a_lock_that_others_hold_is_waited_for_with_a_message(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("graincode.core.waiting.MESSAGE_SECONDS", 0.1)
    with locked(tmp_path / "a.lock"), pytest.raises(filelock.Timeout), locked(tmp_path / "a.lock", 1.2):
        raise AssertionError
    assert any("a.lock" in message for message in caplog.messages)
