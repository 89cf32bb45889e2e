"""Processes of a run meet on the loopback interface, and end together where the first is refused."""

import errno
import os
import socket
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megarl.errors import ConfigError, NumericsError, UnavailableError
from megarl.parallel import meeting
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.meeting import Seat, first_does, open_store
from tests.e2e.runs import launched
from tests.refusals import refused
from tests.worlds import Worlds


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def without_a_group(port: int, work: Any) -> Any:
    """What `work` returns in a process that torchrun has just started, where its store is the first process's."""
    with launched():
        os.environ["MASTER_PORT"] = str(port)
        dist.barrier()  # a process that leaves at once closes connections that the others still make
        dist.destroy_process_group()
        return work()


def listening() -> set[str]:
    connections = psutil.Process().net_connections()
    return {found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN}


def addresses(port: int) -> tuple[set[str], str]:
    def joined() -> tuple[set[str], str]:
        grid = Grid(Layout(tp=2), start_world(60.0))
        dist.all_reduce(torch.ones(1), group=grid.groups.tp)
        found = listening()
        grid.close()
        return found, os.environ["GLOO_SOCKET_IFNAME"]

    return without_a_group(port, joined)


def test_a_world_on_one_machine_listens_on_loopback_only(worlds: Worlds) -> None:
    loopback = {
        name for name, found in psutil.net_if_addrs().items() if any(one.address == "127.0.0.1" for one in found)
    }
    for found, interface in worlds.run(2, addresses, free_port()):
        assert found == {"127.0.0.1"}
        assert interface in loopback, "a host's name may stand for another of its addresses"


def test_an_interface_that_the_environment_names_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth8")
    meeting.stay_on_this_machine()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth7", "eth8")


@pytest.mark.parametrize(("local", "one_machine"), [("2", True), ("1", False), (None, False)])
def test_a_world_over_several_machines_is_known_as_such(local: str | None, one_machine: bool) -> None:
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "7"}
    environ |= {"LOCAL_WORLD_SIZE": local} if local else {}
    seat = Seat.launched(environ)
    assert seat == Seat(1, 2, "host", 7, one_machine)
    assert Seat.launched({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}) is None


def test_nobody_at_the_meeting_point_is_one_line() -> None:
    port = free_port()
    with refused(UnavailableError, key="MASTER_PORT", value=port, where=f"127.0.0.1:{port}"):
        open_store(Seat(1, 2, "127.0.0.1", port, one_machine=True), timeout_s=0.5)


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = os.strerror(errno.EADDRINUSE)
        with refused(UnavailableError, key="MASTER_PORT", value=port, names=(taken,)):
            open_store(Seat(0, 2, "127.0.0.1", port, one_machine=True), timeout_s=0.5)


def refused_then_not() -> list[Any]:
    """What this rank comes to: a refusal, then work that only the first does, then another refusal."""
    calls: list[Any] = []

    def refuse() -> None:
        calls.append("asked")
        raise NumericsError("run.dir=x is in use", key="run.dir", value="x")

    for work in (refuse, lambda: calls.append("worked"), refuse):
        try:
            first_does(work, 60.0)
        except NumericsError as problem:
            calls.append((problem.key, problem.value, problem.said))
    return calls


@pytest.mark.parametrize("before_there_is_a_group", [True, False])
def test_what_the_first_process_is_refused_ends_all(
    before_there_is_a_group: bool, worlds: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    no = ("run.dir", "x", True)
    if before_there_is_a_group:
        answers = worlds.run(2, without_a_group, free_port(), refused_then_not)
    else:
        answers = worlds.run(2, refused_then_not)
    assert answers == [["asked", no, "worked", "asked", no], [no, no]]


@pytest.mark.parametrize(("number", "worked"), [("0", [1]), ("1", [])])
def test_processes_that_the_first_one_starts_do_not_wait(
    number: str, worked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", number)
    done: list[int] = []
    first_does(lambda: done.append(1), 60.0)
    assert done == worked


def fails_on_the_first() -> tuple[str | None, bool]:
    device = start_world()
    grid = Grid(Layout.for_world(dist.get_world_size()), device)

    def fail() -> None:
        raise ConfigError("run.dir is no such thing", key="run.dir")

    try:
        grid.run_on_rank0(fail)
    except ConfigError as error:
        return error.key, error.said
    return "nothing", False


def test_what_the_first_rank_fails_of_is_raised_by_all_and_told_by_it_alone(worlds: Worlds) -> None:
    assert worlds.run(2, fails_on_the_first) == [("run.dir", False), ("run.dir", True)]
