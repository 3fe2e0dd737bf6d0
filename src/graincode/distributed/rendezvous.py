"""The store through which the processes of a job find each other: the command of machine 0 holds it."""

from __future__ import annotations

import socket
import time
from datetime import timedelta

from torch.distributed import TCPStore

from graincode.core.errors import check
from graincode.core.waiting import Wait, limit_waits
from graincode.distributed.hardware import Hardware

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 5


def meet(hardware: Hardware) -> TCPStore:
    """The store of a job, once the commands of all its machines have come to it; on loopback for a single machine.

    Raises GraincodeError if the port is taken, or if another machine does not come within `timeout_minutes`.
    """
    limit_waits(hardware.timeout_minutes)
    nodes, own = hardware.num_nodes, hardware.node_rank
    timeout = timedelta(minutes=hardware.timeout_minutes)
    if own == 0:
        listener = _listen(hardware)
        address, port = "127.0.0.1", listener.getsockname()[1]
        store = TCPStore(
            address, port, nodes, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    else:
        address, port = hardware.address(), hardware.main_port
        _until_it_answers(address, port)
        store = TCPStore(address, port, nodes, False, timeout, wait_for_workers=False)
    twice = store.add(f"machine_{own}", 1) > 1
    check("node_rank", own, "a number that no other machine has", not twice)
    for other in range(nodes):
        wait = Wait(f"machine {other} of {nodes} (node_rank={other})")
        while not store.check([f"machine_{other}"]):
            wait.again()
            time.sleep(_POLL_SECONDS)
    return store


def _listen(hardware: Hardware) -> socket.socket:
    """A socket that listens: for processes of this machine, or for those of all machines."""
    if hardware.num_nodes == 1:
        return socket.create_server(("127.0.0.1", 0))
    hardware.address()  # refuses what the other machines could not find
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", hardware.main_port), family=family, dualstack_ipv6=both)
    except OSError as error:
        check("main_port", hardware.main_port, f"a free port ({error.strerror})", False)
        raise


def _until_it_answers(address: str, port: int) -> None:
    wait = Wait(f"machine 0 at main_address={address}, main_port={port}")
    while True:
        try:
            socket.create_connection((address, port), _ANSWER_SECONDS).close()
            return
        except OSError as error:
            wait.again(error.strerror or error)
            time.sleep(_POLL_SECONDS)
