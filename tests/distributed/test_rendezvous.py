"""Where the processes of a job meet: who can get there, and what is said while they wait."""

import socket
import threading
from pathlib import Path

import pytest
from helpers import free_ports

from graincode.core import waiting
from graincode.core.errors import GraincodeError
from graincode.distributed.hardware import Hardware
from graincode.distributed.rendezvous import meet

BRIEF = {"num_nodes": 2, "timeout_minutes": 0.01}


@pytest.fixture(autouse=True)
def _messages_come_early(monkeypatch):
    monkeypatch.setattr(waiting, "MESSAGE_SECONDS", 0.1)
    monkeypatch.setattr(waiting, "_limit_minutes", 30)


def listening(port):
    """The addresses at which this machine listens at a port, as the kernel writes them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {
        line[1].rpartition(":")[0] for line in lines if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port
    }


@pytest.mark.when("one machine runs several processes", "they meet on its loopback interface, out of others' reach")
def test_one_machine_listens_to_itself_alone():
    store = meet(Hardware(num_processes=2))
    assert listening(store.port) == {"0100007F"}


@pytest.mark.when("hardware.main_port is in use", "machine 0 ends at once with an error that names it")
def test_a_port_in_use_is_refused_at_once():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(GraincodeError, match=f"main_port={port}: "):
            meet(Hardware(**BRIEF, main_address="127.0.0.1", main_port=port))


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
@pytest.mark.when(
    "machine 0 does not answer, or its name is unknown",
    "a message every 30 seconds says where it is looked for; the command ends after hardware.timeout_minutes",
)
def test_a_machine_that_does_not_answer_is_waited_for_only_so_long(address, caplog):
    hardware = Hardware(**BRIEF, node_rank=1, main_address=address, main_port=free_ports())
    with pytest.raises(GraincodeError, match=f"main_address={address}.*timeout_minutes=0.01"):
        meet(hardware)
    assert any(message.startswith("waiting for machine 0 at") for message in caplog.messages)


@pytest.mark.when(
    "another machine does not come",
    "a message every 30 seconds names it; the command ends after hardware.timeout_minutes",
)
def test_a_machine_that_does_not_come_is_waited_for_only_so_long(caplog):
    with pytest.raises(GraincodeError, match="machine 1 of 2"):
        meet(Hardware(**BRIEF, main_address="127.0.0.1", main_port=free_ports()))
    assert any(message.startswith("waiting for machine 1 of 2") for message in caplog.messages)


def test_machines_with_the_same_number_are_told():
    nodes = {"num_nodes": 2, "main_address": "127.0.0.1", "main_port": free_ports()}
    found = []

    def come(rank):
        try:
            found.append(meet(Hardware(**nodes, node_rank=rank)))
        except GraincodeError as error:
            found.append(error)

    first = threading.Thread(target=come, args=(0,))
    first.start()
    come(0 + 1)
    first.join()
    with pytest.raises(GraincodeError, match="node_rank=1: "):
        meet(Hardware(**nodes, node_rank=1))
