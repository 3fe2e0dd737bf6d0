"""Signals on systems that lack some."""

import runpy
import signal

from graincode.distributed import signals


def test_a_system_without_a_user_signal_handles_the_others(monkeypatch):
    assert signals.SIGNALS == (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    monkeypatch.delattr(signal, "SIGUSR1")
    assert runpy.run_path(signals.__file__)["SIGNALS"] == (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
