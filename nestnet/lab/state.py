"""What a lab has and where: the part of it that survives kill -9, read by every later command."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nestnet.agent import netns
from nestnet.model.errors import Conflict
from nestnet.model.values import Tag

RUN = Path("/run/nestnet")
BPFFS = Path("/sys/fs/bpf/nestnet")
PREFIX = "nn-"  # of the names of all namespaces of all labs


@dataclass(frozen=True, slots=True)
class Process:
    """A process that a lab started. `started` is its start time in clock ticks since boot: a pid may be reused,
    a pid with its start time is not."""

    name: str
    pid: int
    started: int

    @classmethod
    def of(cls, name: str, pid: int) -> Process:
        return cls(name, pid, start_time(pid) or 0)

    def alive(self) -> bool:
        return start_time(self.pid) == self.started

    def send(self, number: signal.Signals) -> bool:
        """Signal it, and nobody who has its pid now. False when it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.alive():  # looked at after the handle was taken: the handle cannot change hands
                return False
            signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        return True


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is none, or only its zombie."""
    try:
        # The name, field 2, is in parentheses and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@dataclass(frozen=True, slots=True)
class Seat:
    """A machine of a lab: its name, underlay address (with prefix length), MTU in bytes, the names of its NICs and the
    VLAN that they are in; and by physical network the NIC that leads there."""

    name: str
    address: str
    mtu: int
    nics: tuple[str, ...] = ("eth0",)
    vlan: Tag | None = None
    trunks: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Lab:
    """One lab. `file` is what it was upped with, `machines` what was made for it."""

    name: str
    file: str = ""
    machines: tuple[Seat, ...] = ()
    processes: tuple[Process, ...] = field(default=())

    @property
    def folder(self) -> Path:
        return RUN / self.name

    @property
    def pins(self) -> Path:
        return BPFFS / self.name

    @property
    def socket(self) -> Path:
        return self.folder / "controller.sock"

    @property
    def controller(self) -> str:
        """The URL of its controller."""
        return f"unix:{self.socket}"

    @property
    def relayed(self) -> str:
        """The URL at which relays reach it, for agents on ports."""
        return f"https+unix:{self.folder / 'relayed.sock'}"

    def metrics(self, machine: str) -> Path:
        """The socket where the agent of a machine answers /metrics."""
        place = [seat.name for seat in self.machines].index(machine)
        return self.folder / f"metrics-{place + 1}.sock"  # short: the path of a socket has 107 characters at most

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def wire(self) -> str:
        """The name of the namespace of its wire."""
        return f"{PREFIX}{self.name}"

    def machine(self, name: str) -> str:
        """The name of a machine's namespace."""
        return f"{self.wire}.{name}"

    @property
    def workloads(self) -> str:
        """What the names of its workloads' namespaces begin with."""
        return f"{self.wire}.port."

    def workload(self, row: int) -> str:
        """The name of the namespace of a port's workload, by the port's row id."""
        return f"{self.workloads}{row}"

    def namespaces(self) -> list[str]:
        """The names of its namespaces that exist."""
        return [name for name in netns.names(self.wire) if name == self.wire or name.startswith(f"{self.wire}.")]

    def has_agent(self, machine: str) -> bool:
        """Does the agent of that machine run? One on a port is started by the machine below, again if need be. A host
        that was granted to whoever asks is called by other names."""
        agents = [process for process in self.processes if process.name == f"agent-{machine}"]
        return all(seat.name != machine for seat in self.machines) or any(process.alive() for process in agents)

    def save(self) -> None:
        """Write what is known, so that a reader sees all of it or the version before."""
        new = self.folder / "lab.json.new"
        new.write_text(json.dumps(asdict(self), indent=2) + "\n")
        new.rename(self.folder / "lab.json")


def load(name: str) -> Lab | None:
    """The lab of this name, if it is up, or something of it is left."""
    try:
        data: dict[str, Any] = json.loads((RUN / name / "lab.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # not ours, or half written by something that is not ours: `down` takes it away
        return Lab(name)
    return Lab(
        name,
        data.get("file", ""),
        tuple(_seat(**seat) for seat in data.get("machines", ())),
        tuple(Process(**process) for process in data.get("processes", ())),
    )


def _seat(
    name: str,
    address: str,
    mtu: int,
    nics: Sequence[str] = ("eth0",),
    vlan: dict[str, Any] | None = None,
    trunks: dict[str, str] | None = None,
) -> Seat:
    return Seat(name, address, mtu, tuple(nics), Tag(**vlan) if vlan is not None else None, trunks or {})


def labs() -> list[str]:
    """The names of all labs that are up, or that left something in a folder, sorted."""
    found = set()
    for folder in (RUN, BPFFS):
        with suppress(FileNotFoundError):
            found |= {entry.name for entry in folder.iterdir() if entry.is_dir()}
    return sorted(found)


def only_lab(names: Sequence[str]) -> str | None:
    """The lab that is meant when none is named; None when none is up. Raises Conflict when several are."""
    if len(names) > 1:
        raise Conflict(f"several labs are up: {', '.join(names)}; choose one with --lab", "several_labs", names)
    return names[0] if names else None


@contextmanager
def locked(name: str) -> Iterator[Lab]:
    """Hold a lab: nobody else brings it up or down meanwhile. Makes its folder."""
    while True:
        folder = RUN / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Whoever held it may have taken the folder away: then we hold one that nobody else will find.
            if not _same(folder, handle):
                continue
            yield load(name) or Lab(name)
            return
        finally:
            os.close(handle)


def _same(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
