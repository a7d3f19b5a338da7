"""The kernel datapath of one machine: its pinned programs and maps, read and written as tables.

    PINS/vLAYOUT/               a folder in bpffs; whoever has it open for writing holds its lock
        port, mac, rule, ...    the tables of compile/tables.py, under the same names
        generation_*, epoch     counters that the agent raises (rule 16)
        flow, connection, ...   what the programs remember and count by themselves
        workload, underlay, ... the programs
        link_IFINDEX            a program on the tcx ingress hook of an interface
        link_IFINDEX_out        and on its egress hook
        object                  a symbolic link, to the hash of the object that the programs are from
        store                   another, to the controller's store that the tables are from
        unfinished              another, while rows are written whose counters are not raised yet

Nothing here ends with the process: traffic flows on, and the next agent opens the same maps. When the object has
changed meanwhile but not its layout, `Kernel.open` loads the new programs onto the pinned maps and swaps them in place,
so no packet meets an empty hook and no connection is forgotten. Another layout has a folder of its own: its tables are
filled first, then `attach` takes over each hook, link and all, and `forget_others` frees what is left of the old.

Others have root, too. `attach`, `pinned_again` and `drifted` find what they took away or wrote over, and put it back.

Look from a shell: `bpftool map dump pinned /sys/fs/bpf/nestnet/LAB/MACHINE/v1/port`, `bpftool net`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import resource
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from nestnet.compile.diff import Action, Bump, Delete, Epoch, Put, diff
from nestnet.compile.tables import GENERATIONS, LAYOUT, TABLES, Rows, Tables, ordered
from nestnet.datapath import build
from nestnet.datapath.btf import Dtype, differences
from nestnet.datapath.libbpf import (
    ARRAY,
    TCX_EGRESS,
    TCX_INGRESS,
    Context,
    Link,
    LoadError,
    Map,
    Object,
    Program,
    Ring,
    get,
    on_hook_numbers,
    pin,
    possible_cpus,
)
from nestnet.model.clock import SECOND
from nestnet.model.connections import FRAGMENT_SECONDS, lifetime
from nestnet.model.errors import Conflict, Exhausted, NestnetError

BPFFS = Path("/sys/fs/bpf")

ProgramName = Literal["workload", "underlay", "tag", "trunk"]
HOOKS: dict[ProgramName, int] = {
    "workload": TCX_INGRESS,
    "underlay": TCX_INGRESS,
    "tag": TCX_EGRESS,
    "trunk": TCX_INGRESS,
}
PROGRAMS = tuple(HOOKS)

CLOSE = 256  # flows of one second that each CPU has in front of the map; mirrors bpf/flow.h
REPLY = 2  # flow.tracked; mirrors bpf/state.h
FLOW_SECONDS = 60  # a flow that nobody used so long is forgotten: composing it again costs microseconds

COUNTERS = tuple(f"generation_{name}" for name in GENERATIONS)
STATE = (
    "flow", "carriage", "connection", "fragment", "opened", "closed", "kept", "told", "asked", "until", "drops",
    "stats", "composed", "emitted", "clock",
)  # fmt: skip
PINNED = (*TABLES, *COUNTERS, "epoch", *STATE)

COUNTER = np.dtype("u8")
SLOT = np.dtype("u4")
RECORD = struct.Struct("<IIII")  # struct record in bpf/state.h, before its data
RECORD_KINDS = {1: "workload", 2: "wire", 3: "drop", 4: "composed", 5: "asked", 6: "relayed", 7: "vlan"}
RECORDS = 1 << 22  # bytes of the ring buffer under test: what one run may emit
INQUIRIES = 1 << 17  # and else: 63 inquiries that nobody has read yet


@dataclass(frozen=True)
class Capacity:
    """How many objects a machine is made for. Fixed when its maps are made: pinned maps keep their size.

    Arrays are allocated whole (a port costs 80 bytes and 72 for counting), all else as it is used.
    """

    networks: int = 4096
    segments: int = 8192
    routers: int = 16384
    ports: int = 16384
    hosts: int = 16384
    machines: int = 4096
    addresses: int = 65536  # MACs, and addresses and prefixes that have an owner
    routes: int = 262144
    hops: int = 524288  # links that begin the ways of routes: the 65536 routes of one network may have 300,000
    members: int = 131072  # of lists: hosts of segments, ports of segments, classes of ports
    prefixes: int = 65536  # CIDRs and services in policies
    rules: int = 262144
    flows: int = 131072
    connections: int = 262144
    fragments: int = 4096
    buckets: int = 32768  # a port that has a rate has two, and so has a link

    def entries(self) -> dict[str, int]:
        """`max_entries` of every map. Slot 0 is nobody, so an array has one more."""
        return {
            "network": self.networks + 1,
            "segment": self.segments + 1,
            "router": self.routers + 1,
            "port": self.ports + 1,
            "host": self.hosts + 1,
            "machine": self.machines + 1,
            "bucket": self.buckets + 1,
            "self": 1,
            "attach": self.ports,
            "vni": self.segments,
            "vlan": self.segments,
            "member": self.machines,
            "mac": self.addresses,
            "owner": self.addresses,
            "route": self.routes,
            "hop": self.hops,
            "face": self.addresses,
            "flood": self.members,
            "local": self.members,
            "peer": self.members,
            "cidr": self.prefixes,
            "service": self.prefixes,
            "rule": self.rules,
            "generation_port": self.ports + 1,
            "generation_policy": self.networks + 1,
            "generation_route": self.networks + 1,
            "generation_flood": self.segments + 1,
            "generation_host": self.hosts + 1,
            "generation_machine": self.machines + 1,
            "epoch": 1,
            "flow": self.flows,
            "carriage": self.flows,
            "connection": self.connections,
            "fragment": self.fragments,
            "opened": self.ports + 1,
            "closed": self.ports + 1,
            "kept": self.ports + 1,
            "told": self.ports + 1,
            "asked": self.ports + 1,
            "until": self.buckets + 1,
            "drops": 4 * self.ports,
            "stats": self.ports + 1,
            "composed": 1,
            "close": CLOSE * possible_cpus(),
            "copied": self.machines + 1,
            "charged": self.hosts + 1,
        }


LAB = Capacity()


@dataclass(frozen=True)
class Record:
    """What a program would have done with a frame, had it not been recording.

    kind      workload: into the one of port `slot`; wire: to the machine `slot`; drop: counted for port `slot`;
              composed: a flow was; asked: by the workload of port `slot`, for the agent to answer; vlan: out by a trunk
    what      the interface, or the number of the reason
    frame     as it would leave, empty for a drop; `length` is its real length, should it be cut here
    """

    kind: str
    slot: int
    what: int
    length: int
    frame: bytes


@dataclass(frozen=True)
class RunResult:
    """One frame through one program: its answer (TC_ACT_*), the frame as it was left, and what was recorded."""

    answer: int
    frame: bytes
    emitted: tuple[Record, ...]


class Kernel:
    """One machine's datapath, open. A context manager: leaving it closes it, and the datapath forwards on."""

    def __init__(self, folder: Path, lock: int | None) -> None:
        self.folder = folder
        self._lock = lock
        self._held: dict[str, Link] = {}  # by pin: open, so that who unlinks a pin empties no hook
        self._raised: dict[str, npt.NDArray[np.uint64]] = {}  # the counters that only we write, as they were written
        self._said: dict[str, str] = {}  # symbolic links in the folder
        self._maps: dict[str, Map] = {}
        self._programs: dict[str, Program] = {}
        self._ring: Ring | None = None
        self._driven = False
        self.remembered: dict[str, int] = {}  # flows and connections that the last sweep left

    @classmethod
    def open(
        cls,
        pins: Path,
        capacity: Capacity = LAB,
        recording: bool = False,
        *,
        driven: bool = False,
        on_port: bool = False,
        object: Path | None = None,
        read_only: bool = False,
    ) -> Kernel:
        """The machine whose pins are in this folder of a bpffs; made if there is none yet.

        recording   nothing is sent: programs tell in `run` what they would have sent
        driven      for the programs it is the time that `set_clock` says; always so when recording
        on_port     the machine is the workload of a host port: more headers follow below
        object      the BPF object; by default built from the sources when they changed
        read_only   for looking, beside the agent that writes. NestnetError if nothing is pinned there

        Raises Conflict while another process has it open for writing, LoadError if the kernel refuses the object,
        BuildError if there is no object and none can be built.
        """
        folder = pins / f"v{LAYOUT}"
        opened = Object(object or build.object_path())
        kernel = None
        try:
            check_layout(opened)
            if read_only:
                kernel = cls(folder, None)
                if not _is_pinned(folder / "epoch"):
                    raise NestnetError(f"no datapath is pinned in {folder}", "no_datapath")
                kernel._get(opened, PINNED)
            else:
                mount(pins)
                kernel = cls(folder, _locked(folder))
                kernel._make(opened, capacity, recording, driven or recording, on_port)
        except BaseException:
            if kernel is not None:
                kernel.close()
            raise
        finally:
            opened.close()
        return kernel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it: what is pinned and attached stays. May be called twice."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        for table in self._maps.values():
            table.close()
        for program in self._programs.values():
            program.close()
        for link in self._held.values():
            link.close()
        self._held.clear()
        self._maps.clear()
        self._programs.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def unpin(self) -> None:
        """Detach everything and forget everything: the kernel frees it. Closes this, too."""
        if self._lock is not None:
            remove(self.folder)
        self.close()

    # ---- making it

    def _make(self, opened: Object, capacity: Capacity, recording: bool, driven: bool, on_port: bool) -> None:
        identity = _identity(opened.path, recording, driven, on_port)
        self._forget_torn(opened, identity)
        complete = all(_is_pinned(self.folder / name) for name in (*PINNED, *PROGRAMS))
        if complete and _link_target(self.folder / "object") == identity:
            self._get(opened, PINNED)
            for name in PROGRAMS:
                self._programs[name] = Program(get(self.folder / name))
        else:
            self._load(opened, capacity, recording, driven, on_port)
            self._swap()
            # Last, so that whoever is killed before this is finished by the next one.
            _link(self.folder / "object", identity)
        said = {name: _link_target(self.folder / name) for name in ("object", "store")}
        self._said = {name: target for name, target in said.items() if target is not None}
        self._raised = {name: self._maps[name].items()[1].astype(COUNTER) for name in (*COUNTERS, "epoch")}
        if (self.folder / "unfinished").is_symlink():
            self._raise_all()
        self._driven = driven
        if recording:
            self._ring = Ring(self._maps["emitted"])
            self._ring.take()

    def _forget_torn(self, opened: Object, identity: str) -> None:
        """Somebody unpinned some maps while no agent ran. Rows of one table without those of another could open what a
        policy closes, so all tables are made anew, and nothing passes before they are filled. What only a newer object
        has is not missing, and neither is what a first start had not come to when it was killed: it has no rows yet."""
        missing = {name for name in PINNED if name in opened.shapes and not _is_pinned(self.folder / name)}
        if _link_target(self.folder / "object") != identity:
            missing -= set(STATE)
        if missing and len(missing) < len(PINNED):
            for name in PINNED:
                (self.folder / name).unlink(missing_ok=True)
            for name in ("object", "store"):
                (self.folder / name).unlink(missing_ok=True)

    def _get(self, opened: Object, names: Sequence[str]) -> None:
        for name in names:
            self._maps[name] = Map(get(self.folder / name), *_dtypes(opened, name), name)

    def _load(self, opened: Object, capacity: Capacity, recording: bool, driven: bool, on_port: bool) -> None:
        present = [name for name in PINNED if name in opened.shapes and _is_pinned(self.folder / name)]
        self._get(opened, present)
        for name in present:
            opened.reuse(name, self._maps[name])
        sizes = capacity.entries() | {"emitted": RECORDS if recording else INQUIRIES}
        for name in (sizes.keys() & opened.shapes.keys()) - set(present):
            opened.resize(name, sizes[name])
        opened.constant("recording", int(recording))
        opened.constant("driven", int(driven))
        opened.constant("on_port", int(on_port))
        opened.load()
        for name, fd in opened.map_fds().items():
            if name in PINNED and name not in present:
                self._maps[name] = Map(fd, *_dtypes(opened, name), name)
                self._maps[name].pin(self.folder / name)
            else:
                os.close(fd)
        self._programs = opened.programs()

    def _swap(self) -> None:
        """Put our programs where others of the same name are: on the hooks first, then in the pins."""
        for path, link in self._links():
            with contextlib.closing(link):
                try:
                    if link.ifindex:
                        if (name := self._attached(link)) is not None:  # else `attach` replaces what somebody put there
                            link.update(self._programs[name])
                        continue
                except OSError as error:
                    if error.errno != errno.ENOLINK:  # the interface went just now
                        raise
                path.unlink()
        for name in PROGRAMS:
            new = self.folder / f"{name}_new"
            new.unlink(missing_ok=True)
            pin(self._programs[name].fd, new)
            new.rename(self.folder / name)

    # ---- tables

    def read(self) -> Tables:
        """What is in the maps now, as the compiler would make it."""
        return {name: self._table(name) for name in TABLES}

    def _table(self, name: str) -> Rows:
        table = TABLES[name]
        rows = self.rows(name)
        if table.key is not None:
            return ordered(table, rows)
        # An array has a value at every slot: a row is there if it has an id, or if, having none, it is not empty.
        values = rows["value"]
        there = values["id"] != 0 if "id" in (values.dtype.names or ()) else _not_zero(values)
        return ordered(table, rows[there])

    def rows(self, name: str) -> Rows:
        """All entries of any map as they are: fields `key` and `value`, by what C says they are."""
        source = self._maps[name]
        keys, values = source.items()
        rows: Rows = np.zeros(len(keys), np.dtype([("key", source.key), ("value", values.dtype, values.shape[1:])]))
        rows["key"], rows["value"] = keys, values
        return rows

    def apply(self, actions: Sequence[Action]) -> None:
        """Do these, in order. Raises Exhausted when a table is full: those before are done, some of that one may be.

        Rows without their counters would leave flows as they were for ever. So where it ends half way, all counters
        are raised: at once after an error, by the next `open` if this process is killed.
        """
        if self._lock is None:
            raise NestnetError("opened for looking only", "read_only")
        if not actions:
            return
        _link(self.folder / "unfinished", "apply")
        try:
            for action in actions:
                self._do(action)
        except BaseException:
            self._raise_all()
            raise
        (self.folder / "unfinished").unlink()

    def _do(self, action: Action) -> None:
        match action:
            case Put(name, rows):
                self._put(self._maps[name], rows["key"], rows["value"])
            case Delete(name, keys):
                table = self._maps[name]
                if table.type == ARRAY:
                    self._put(table, keys, np.zeros(len(keys), table.value))
                    if name == "bucket":  # the next one's is full
                        self._put(self._maps["until"], keys, np.zeros(len(keys), COUNTER))
                else:
                    table.delete(keys)
            case Bump(counter, slots):
                self._raise(f"generation_{counter}", np.unique(slots))
            case Epoch():
                self._raise("epoch", np.zeros(1, SLOT))

    def _raise_all(self) -> None:
        """Every flow looks at everything again before its next packet."""
        for name in (*COUNTERS, "epoch"):  # the epoch last: a flow that sees it sees the counters
            self._raise(name, np.arange(self._maps[name].max_entries, dtype=SLOT))
        (self.folder / "unfinished").unlink(missing_ok=True)

    def _raise(self, name: str, slots: npt.NDArray[np.uint32]) -> None:
        """Add one to these slots of a counter, which nobody else writes; a program reads each as one word."""
        counter, raised = self._maps[name], self._raised[name]
        if len(slots) and int(slots.max()) >= len(raised):
            limit = counter.max_entries
            raise Exhausted(f"counter {counter.name} has {limit} slots on this machine", "table_full", limit)
        raised[slots] += COUNTER.type(1)
        self._put(counter, slots, raised[slots])

    def _put(self, table: Map, keys: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
        try:
            table.update(keys, values)
        except OSError as error:
            if error.errno not in (errno.E2BIG, errno.ENOSPC):
                raise
            limit = table.max_entries
            raise Exhausted(
                f"table {table.name} has room for {limit} rows on this machine", "table_full", limit
            ) from error

    @property
    def store(self) -> str | None:
        """Which store the tables are from; None when nobody has said."""
        return _link_target(self.folder / "store")

    @store.setter
    def store(self, name: str) -> None:
        if self.store != name:
            self._said["store"] = name
            _link(self.folder / "store", name)

    # ---- where programs are

    def attach(self, ifindex: int, program: ProgramName) -> bool:
        """See to it that a program is on its hook of an interface of the calling thread's network namespace, once.
        True if it was not; cheap if it was. Programs of others stay where they are.

        One of ours that is there already, of whatever version or layout, is replaced in place. OSError ENODEV if there
        is no such interface.
        """
        number = self._programs[program].id
        hook = HOOKS[program]
        path = _link_path(self.folder, ifindex, hook)
        link = self._held.get(path.name)
        if link is not None and number in on_hook_numbers(ifindex, hook):
            return False
        if link is None:
            self._adopt(path)
            link = Link(get(path)) if _is_pinned(path) else None
        if link is not None:
            if link.ifindex == ifindex:
                was = link.program
                link.update(self._programs[program])
                if number in on_hook_numbers(ifindex, hook):
                    self._hold(path.name, link)
                    return was != number
            # Somebody took it off, or its interface is gone, or elsewhere, and the number has come up again.
            self._held.pop(path.name, None)
            link.close()
            path.unlink(missing_ok=True)
        made = Link.create(self._programs[program], ifindex, hook)
        pin(made.fd, path)
        self._hold(path.name, made)
        return True

    def _hold(self, pin: str, link: Link) -> None:
        """Keep it open, if there is room: a process may have so many files, and others are needed, too."""
        if pin in self._held:
            return
        if len(self._held) < _may_open() // 2:
            self._held[pin] = link
        else:
            link.close()

    def _adopt(self, path: Path) -> None:
        """Take over the link that an older or newer layout has on the same interface: two would both see each frame."""
        for other in path.parent.parent.glob(f"v*/{path.name}"):
            if other == path:
                continue
            if _is_pinned(path):
                _detach(other)
            else:
                other.rename(path)

    def detach(self, ifindex: int, *, egress: bool = False) -> None:
        """Take our program off a hook of an interface, which may be gone. No error if there is none."""
        name = _link_path(self.folder, ifindex, TCX_EGRESS if egress else TCX_INGRESS).name
        if (held := self._held.pop(name, None)) is not None:
            with contextlib.closing(held):
                _take_off(held)
        for path in self.folder.parent.glob(f"v*/{name}"):
            _detach(path)

    def attached(self, *, egress: bool = False) -> dict[int, ProgramName]:
        """The interfaces that are there and have one of our programs, of any layout, on this hook, and which."""
        hook = TCX_EGRESS if egress else TCX_INGRESS
        found: dict[int, ProgramName] = {}
        for path in sorted(self.folder.parent.glob("v*/link_*")):
            with contextlib.closing(Link(get(path))) as link:
                name = self._attached(link)
                if name is not None and HOOKS[name] == hook:
                    found[int(path.name.split("_")[1])] = name
        return found

    def _links(self) -> Iterator[tuple[Path, Link]]:
        for path in sorted(self.folder.glob("link_*")):
            yield path, Link(get(path))

    def _attached(self, link: Link) -> ProgramName | None:
        """Which program a link runs, by name: after an agent was killed it may be neither the pinned one nor ours."""
        if not link.ifindex:
            return None
        with contextlib.closing(Program.of_id(link.program)) as running:
            return next((name for name in PROGRAMS if name == running.name), None)

    # ---- what others did

    def pinned_again(self) -> int:
        """Pin what somebody unpinned, also where the whole folder has gone: how many pins that were. An agent that came
        later would find no hook, no table and no connection without them."""
        mine = {name: link.fd for name, link in self._held.items()}
        mine |= {name: table.fd for name, table in self._maps.items()}
        mine |= {name: program.fd for name, program in self._programs.items()}
        try:
            there = set(os.listdir(self.folder))  # noqa: PTH208 - of ten thousand
        except FileNotFoundError:
            there = set()
            mount(self.folder.parent)
            lock = _locked(self.folder)
            if self._lock is not None:
                os.close(self._lock)
            self._lock = lock
        missing = [name for name in mine if name not in there]
        for name in missing:
            pin(mine[name], self.folder / name)
        for name, target in self._said.items():
            if name not in there:
                _link(self.folder / name, target)
        return len(missing)

    def drifted(self, want: Tables) -> list[str]:
        """The tables whose rows are not these, and counters that are not as they were raised: somebody wrote them."""
        found = [name for name in TABLES if self._table(name).tobytes() != want[name].tobytes()]
        return found + [
            name for name, raised in self._raised.items() if not np.array_equal(self._maps[name].items()[1], raised)
        ]

    def restore(self, want: Tables) -> None:
        """Make the tables these rows, whatever they are, and have every flow look at everything again: some may have
        been composed of what should not have been there."""
        if self._lock is None:
            raise NestnetError("opened for looking only", "read_only")
        _link(self.folder / "unfinished", "restore")
        try:
            for action in diff(self.read(), want):
                if isinstance(action, Put | Delete):
                    self._do(action)
        finally:
            self._raise_all()

    def forget_others(self) -> None:
        """Free the maps of layouts that no hook uses any more, if nobody writes them."""
        for folder in self.folder.parent.glob("v*"):
            if folder != self.folder and not any(folder.glob("link_*")):
                with contextlib.suppress(Conflict):
                    lock = _locked(folder)
                    try:
                        # In one step, for who goes back to that layout must find all of it or nothing.
                        folder.rename(folder.with_name(f"left_{folder.name}"))
                    finally:
                        os.close(lock)
        for folder in self.folder.parent.glob("left_v*"):
            remove(folder)

    # ---- what the programs remember and count

    def drops(self) -> dict[tuple[int, int], int]:
        """Packets by port slot and number of the reason (`reasons.NAMES`), since the maps were made."""
        rows = self.rows("drops")
        key = rows["key"]
        return {
            (int(port), int(reason)): int(packets)
            for port, reason, packets in zip(key["port"], key["reason"], rows["value"], strict=True)
        }

    def stats(self) -> Rows:
        """Traffic of ports by slot, all CPUs in one sum; ports without any are left out.

        `value`: out_packets and out_bytes come from the workload, in_packets and in_bytes go to it.
        """
        rows = self.rows("stats")
        values = rows["value"]
        total: Rows = np.zeros(len(rows), np.dtype([("key", rows["key"].dtype), ("value", values.dtype)]))
        total["key"] = rows["key"]
        for name in values.dtype.names or ():
            total["value"][name] = values[name].sum(axis=1)
        return total[_not_zero(total["value"])]

    def composed(self) -> dict[str, int]:
        """How often a flow, or how a host reaches another, was composed, at first or again: `flows`, `carriages`."""
        (row,) = self.rows("composed")
        return {name: int(row["value"][name].sum()) for name in row["value"].dtype.names or ()}

    def flows(self) -> Rows:
        """Every flow that is composed now: struct flow_key and struct flow of bpf/state.h."""
        return self.rows("flow")

    def connections(self) -> Rows:
        """Every connection that is remembered: struct connection_key and struct connection of bpf/state.h."""
        return self.rows("connection")

    def adopt(self, keys: bytes, values: bytes) -> None:
        """Remember these connections, too, but for those that are there already: packed structs as of bpf/state.h.
        Their openers have them in their shares. Raises OSError when there is no room for all of them."""
        table = self._maps["connection"]
        rows: Rows = np.frombuffer(keys, table.key)
        fresh: Rows = rows[table.insert(rows, np.frombuffer(values, table.value))]
        slots, amounts = np.unique(fresh["source"], return_counts=True)
        # Programs write `opened`; of the two, `closed` is ours, and what counts is the difference, modulo 2^64.
        self._count_closed(slots, -amounts.astype(COUNTER))

    def _count_closed(self, slots: npt.NDArray[np.integer], amounts: npt.NDArray[np.uint64]) -> None:
        if len(slots):  # nobody else writes these
            closed = self._maps["closed"].items()[1].astype(COUNTER)[slots]
            self._put(self._maps["closed"], slots.astype(SLOT), closed + amounts)

    def seconds(self) -> int:
        """The programs' clock, as connections have it."""
        return int(self.clock() // SECOND)

    def count_drop(self, slot: int, reason: int) -> None:
        """Count a packet that the agent dropped, for one of the reasons that no program counts."""
        table = self._maps["drops"]
        key = np.array([(slot, reason)], table.key)
        count = table.lookup(key)
        table.update(key, np.array([1], COUNTER) if count is None else count.astype(COUNTER) + COUNTER.type(1))

    def inquiries(self) -> Inquiries:
        """What workloads ask from now on. Not for one that records."""
        return Inquiries(self._maps["emitted"])

    def sweep(self, now: float | None = None) -> dict[str, int]:
        """Forget what is over: how many of each map. `now`: in seconds of the programs' clock.

        A connection lives on after its last packet as model/connections.py says; its opener gets its share back.
        """
        clock = int(self.clock() // SECOND if now is None else now)
        gone: dict[str, int] = {}

        rows = self.rows("connection")
        idle = _idle(rows, clock)
        value, protocol = rows["value"], rows["key"]["tuple"]["protocol"]
        lives = np.where(
            protocol == 6, np.where(value["closing"] != 0, lifetime(6, True), lifetime(6, False)), lifetime(17, False)
        )
        over = rows["key"][idle >= lives]
        gone["connection"] = self._maps["connection"].delete(over)
        self.remembered["connection"] = len(rows) - len(over)
        slots, amounts = np.unique(over["source"], return_counts=True)
        self._count_closed(slots, amounts.astype(COUNTER))

        rows = self.rows("fragment")
        gone["fragment"] = self._maps["fragment"].delete(rows["key"][_idle(rows, clock) >= FRAGMENT_SECONDS])

        pairs = self.rows("carriage")["key"]  # before the flows, so that one that is made now keeps its pair
        rows = self.rows("flow")
        unused = _idle(rows, clock) >= FLOW_SECONDS
        gone["flow"] = self._maps["flow"].delete(rows["key"][unused])
        self.remembered["flow"] = int(len(rows) - unused.sum())
        left = rows["value"][~unused]
        openers = np.where(left["tracked"] == REPLY, left["target"], left["source"])
        kept = self._maps["kept"].items()[1].astype(COUNTER)
        counts = np.bincount(openers[openers < len(kept)], minlength=len(kept)).astype(COUNTER)
        slots = np.flatnonzero(counts != kept)  # what programs kept meanwhile is counted by the next sweep
        self._put(self._maps["kept"], slots.astype(SLOT), counts[slots])
        using = _pair(left)
        gone["carriage"] = self._maps["carriage"].delete(pairs[~np.isin(_pair(pairs), using)])
        return gone

    # ---- test runs

    def run(self, frame: bytes, ifindex: int, program: ProgramName, *, gso_size: int = 0) -> RunResult:
        """One frame through a program as if it came in at that interface of the calling thread's network namespace.

        Without `recording` a frame may really leave, and nothing is told about it.
        """
        if self._ring is not None:
            self._ring.take()
        done = self._programs[program].test_run(frame, Context(ifindex=ifindex, gso_size=gso_size))
        return RunResult(done.answer, done.frame, tuple(map(_record, self._ring.take() if self._ring else ())))

    def duration(self, frame: bytes, ifindex: int, program: ProgramName, repeat: int) -> int:
        """Nanoseconds for one frame, on average of so many in a row. For frames that are dropped: see `test_run`."""
        return self._programs[program].test_run(frame, Context(ifindex=ifindex), repeat).nanoseconds

    def forget(self) -> None:
        """Forget all flows, carriage, connections, fragments and buckets, and what was counted: as after a start.

        For tests: it cuts connections.
        """
        for name in ("flow", "carriage", "connection", "fragment", "drops"):
            self._maps[name].delete(self._maps[name].items()[0])
        for name in ("opened", "closed", "kept", "told", "asked", "until"):
            keys, values = self._maps[name].items()
            used = np.flatnonzero(values)
            self._maps[name].update(keys[used], np.zeros(len(used), COUNTER))
        self._raise("epoch", np.zeros(1, SLOT))  # for copies of flows that programs have at hand

    def clock(self) -> int:
        """What time it is for the programs, in ns: the monotonic clock, unless a test drives it."""
        return int(self.rows("clock")["value"][0]) if self._driven else time.monotonic_ns()

    def set_clock(self, now: int) -> None:
        """Say what time it is, in ns, to programs that were opened as `driven`."""
        self._put(self._maps["clock"], np.zeros(1, SLOT), np.array([now], COUNTER))


class Inquiries:
    """What workloads ask the network, as it comes. Whoever waits for it polls `fileno()` and then takes all."""

    def __init__(self, source: Map) -> None:
        self._ring = Ring(source)
        self._ring.take()  # nobody waits for an answer to what is older than this agent

    def fileno(self) -> int:
        return self._ring.fileno()

    def take(self) -> list[Record]:
        """All inquiries that are there: see `Record`."""
        return [_record(raw) for raw in self._ring.take()]

    def close(self) -> None:
        self._ring.close()


# ---- layout


def check_layout(opened: Object) -> None:
    """Python's tables and the object's are the same bytes. LoadError names every map and field that is not."""
    wrong: list[str] = []
    for name in PINNED:
        shape = opened.shapes.get(name)
        if shape is None:
            wrong.append(f"{name}: the object has no such map")
            continue
        pairs: list[tuple[str, Dtype, Dtype | None]] = []
        if name in TABLES:
            table = TABLES[name]
            pairs = [("key", table.key or SLOT, shape.key), ("value", table.value, shape.value)]
        elif name in (*COUNTERS, "epoch", "opened", "closed", "kept", "told", "asked", "until", "clock"):
            pairs = [("key", SLOT, shape.key), ("value", COUNTER, shape.value)]
        for what, ours, theirs in pairs:
            if theirs is None:
                wrong.append(f"{name}: no type of its {what}")
            else:
                wrong += [f"{name} {what}: {difference}" for difference in differences(ours, theirs)]
    if wrong:
        raise LoadError(f"{opened.path} has other tables than compile/tables.py\n  " + "\n  ".join(wrong))


def _dtypes(opened: Object, name: str) -> tuple[Dtype | None, Dtype | None]:
    """How the rows of a map are read: the tables as the compiler has them, all else as C declares it."""
    if name in TABLES:
        table = TABLES[name]
        return table.key if table.key is not None else SLOT, table.value
    shape = opened.shapes[name]
    return shape.key, shape.value


# ---- folders in bpffs


def mount(pins: Path) -> None:
    """See to a bpffs under the folder of the pins: it is mounted on /sys/fs/bpf if nobody has. NestnetError if not."""
    if not any(pins.is_relative_to(place) for place in _bpffs()):
        if pins.is_relative_to(BPFFS):
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", 0, None) == 0:
                return
            why = os.strerror(ctypes.get_errno())
            raise NestnetError(f"cannot mount a BPF file system on {BPFFS}: {why}", "no_bpffs")
        raise NestnetError(f"{pins} is in no BPF file system: choose a folder under {BPFFS}", "no_bpffs")


def _bpffs() -> list[Path]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(fields[1]) for fields in mounts if fields[2] == "bpf"]


def remove(folder: Path) -> None:
    """Unpin everything in a folder of pins, links first: hooks are empty before what they use is gone."""
    for path in folder.glob("link_*"):
        _detach(path)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _detach(path: Path) -> None:
    """Take a pinned link off its hook and forget it, whether it or its interface is there or not."""
    if _is_pinned(path):
        with contextlib.closing(Link(get(path))) as link:
            _take_off(link)
        path.unlink()


def _take_off(link: Link) -> None:
    try:
        link.detach()
    except OSError as error:
        if error.errno != errno.ENOLINK:  # the interface is gone, and took the link off its hook
            raise


def _may_open() -> int:
    """How many files this process may have open, which is as many as root may let it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def _locked(folder: Path) -> int:
    """The folder, made and locked for one writer. The lock ends with the descriptor, so with the process."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another one just removed it
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise Conflict(f"another process writes the datapath in {folder}", "datapath_busy") from error
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        os.close(fd)  # removed between open and lock


def _identity(path: Path, recording: bool, driven: bool, on_port: bool) -> str:
    """What the pinned programs are from. No dots: bpffs keeps them for itself."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return digest + "-recording" * recording + "-driven" * driven + "-on_port" * on_port


def _link_target(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        return None


def _link(path: Path, target: str) -> None:
    """Make or replace a symbolic link, whole at every moment."""
    new = path.with_name(f"{path.name}_new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.rename(path)


def _is_pinned(path: Path) -> bool:
    return path.exists()


def _link_path(folder: Path, ifindex: int, hook: int) -> Path:
    return folder / (f"link_{ifindex}" if hook == TCX_INGRESS else f"link_{ifindex}_out")


# ---- rows


def _not_zero(values: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Which rows have any bit set."""
    raw = np.ascontiguousarray(values).view("u1").reshape(len(values), values.dtype.itemsize)
    return np.asarray(raw.any(axis=1))


def _idle(rows: Rows, clock: int) -> npt.NDArray[np.int64]:
    """Seconds since each was used. One that was used after `clock` was taken has not been idle."""
    since = np.uint32(clock) - np.ascontiguousarray(rows["value"]["seen"])  # modulo 2**32, as the programs count
    idle: npt.NDArray[np.int64] = np.maximum(since.view("i4").astype("i8"), 0)
    return idle


def _pair(values: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Hosts a and b in one number."""
    pair: npt.NDArray[np.uint64] = values["a"].astype("u8") << np.uint64(32) | values["b"]
    return pair


def _record(raw: bytes) -> Record:
    kind, slot, what, length = RECORD.unpack_from(raw)
    frame = b"" if RECORD_KINDS[kind] == "drop" else raw[RECORD.size : RECORD.size + length]
    return Record(RECORD_KINDS[kind], slot, what, length, frame)
