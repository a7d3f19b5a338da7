"""What a machine remembers of connections goes along with the ports that leave it, by way of the controller (rule 15).

Whenever the world has another phase of a move, the agent reads what it was given before its turn, and writes what it
has behind it. Which of the two machines gives and which takes is the controller's to know: it turns the other one down.
A copy that fails is told and not repeated: those connections are judged as new ones, and the move goes on.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from nestnet.compile.compiler import mover, place
from nestnet.compile.slots import Slots
from nestnet.model.errors import NestnetError, NotFound
from nestnet.model.values import Port, World

if TYPE_CHECKING:
    from nestnet.api.client import Client
    from nestnet.datapath.kernel import Kernel


KEY = struct.Struct("<II16s16sHHBBxx")  # struct connection_key of bpf/state.h
VALUE = struct.Struct("<QII")  # struct connection: sum, seen, closing


class Known(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One connection: the ports of its opener and of the other end, by id; its tuple, addresses as 16 bytes; for how
    many seconds nothing was heard of it, and whether it is closing."""

    opener: int
    answerer: int
    source: bytes
    target: bytes
    source_port: int
    target_port: int
    protocol: int
    family: int
    idle: int
    closing: bool


@dataclass
class Moves:
    """The moves that this machine has part in."""

    client: Client
    name: str
    say: Callable[[str], None]
    _phases: Mapping[int, tuple[Port, frozenset[int]]] = field(default_factory=dict)  # by the port that moves
    _given: object = None

    def before(self, world: World, machine: int, kernel: Kernel, slots: Slots) -> None:
        """A turn begins."""
        now = moving(world, machine)
        for port, (value, ports) in {**self._phases, **now}.items():
            if now.get(port, (None,))[0] != self._phases.get(port, (None,))[0] and port in self._phases:
                self._take(value, ports, kernel, slots)
        self._phases = now

    def behind(self, kernel: Kernel, slots: Slots) -> None:
        """A turn has come to its end."""
        if self._given != self._phases:
            self._given = self._phases
            for port, (_, ports) in self._phases.items():
                known = remembered(kernel, slots, ports)
                self._try(port, lambda port=port, known=known: self._give(port, known))  # type: ignore[misc]

    def _give(self, port: int, known: Iterable[Known]) -> None:
        self.client.give_connections(self.name, port, msgspec.msgpack.encode(list(known)))

    def _take(self, value: Port, ports: frozenset[int], kernel: Kernel, slots: Slots) -> None:
        def take() -> None:
            given = self.client.take_connections(self.name, value.id)
            if given:
                adopt(kernel, slots, ports, msgspec.msgpack.decode(given, type=list[Known]))

        self._try(value.id, take)

    def _try(self, port: int, copy: Callable[[], None]) -> None:
        try:
            copy()
        except NotFound:
            pass  # the other one's, or over
        except (NestnetError, OSError, msgspec.MsgspecError) as error:
            self.say(f"port {port}: its connections are not copied: {error}")


def moving(world: World, machine: int) -> dict[int, tuple[Port, frozenset[int]]]:
    """What moves to this machine or from it: the port that moves, and all ports that come along."""
    found: dict[int, set[int]] = defaultdict(set)
    if any(port.other for port in world.ports.values()):
        for port in world.ports.values():
            who = mover(world, port)
            places = place(world, port)[1], place(world, port, other=True)[1]
            if who is not None and machine in places and places[0] != places[1]:
                found[who.id].add(port.id)
    return {port: (world.ports[port], frozenset(ports)) for port, ports in found.items()}


def remembered(kernel: Kernel, slots: Slots, ports: frozenset[int]) -> list[Known]:
    """The connections that these ports are an end of."""
    rows = kernel.connections()
    ours = [slots.get(("port", port)) for port in ports]
    rows = rows[np.isin(rows["key"]["source"], ours) | np.isin(rows["key"]["target"], ours)]
    ids, now = slots.ids("port"), kernel.seconds()
    keys, values = (np.ascontiguousarray(rows[part]).tobytes() for part in ("key", "value"))
    found = []
    for key, value in zip(KEY.iter_unpack(keys), VALUE.iter_unpack(values), strict=True):
        opener, answerer, source, target, source_port, target_port, protocol, family = key
        _, seen, closing = value
        if opener in ids and answerer in ids:
            flow = source, target, source_port, target_port, protocol, family
            found.append(Known(ids[opener], ids[answerer], *flow, idle=max(now - seen, 0), closing=bool(closing)))
    return found


def adopt(kernel: Kernel, slots: Slots, ports: frozenset[int], known: Iterable[Known]) -> None:
    """Remember these connections, too, as far as one of these ports is an end of them and both are known here. They
    have been judged by nobody: the next packet has the opener judged again (rule 19)."""
    now = kernel.seconds()
    keys, values = bytearray(), bytearray()
    for one in known:
        ends = slots.get(("port", one.opener)), slots.get(("port", one.answerer))
        if all(ends) and {one.opener, one.answerer} & ports and {len(one.source), len(one.target)} == {16}:
            flow = one.source, one.target, one.source_port, one.target_port, one.protocol, one.family
            keys += KEY.pack(*ends, *flow)
            values += VALUE.pack(0, max(now - one.idle, 0), one.closing)
    kernel.adopt(bytes(keys), bytes(values))
