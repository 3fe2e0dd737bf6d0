"""Waits say what they are for."""

import pytest

from graincode.core import waiting
from graincode.core.errors import GraincodeError
from graincode.core.waiting import Wait, limit_waits


def test_a_wait_says_so_every_thirty_seconds_and_ends(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(waiting, "_limit_minutes", 0.0)
    limit_waits(2)
    limited, endless = Wait("the other"), Wait("the builder", is_limited=False)
    for clock[0] in range(119):
        limited.again("refused")
    assert [message.count("the other") for message in caplog.messages] == [1, 1, 1]
    assert "(refused)" in caplog.messages[0]
    clock[0] = 120
    with pytest.raises(GraincodeError, match=r"the other .*timeout_minutes=2"):
        limited.again()
    clock[0] = 1e6
    endless.again()
