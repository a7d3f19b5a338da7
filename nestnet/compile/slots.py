"""Slots: the small numbers one machine gives to objects, indexes into the datapath's arrays.

They are a value and an argument: tables are a function of (world, slots), so "incremental equals
from scratch" needs no renaming. A slot that an object leaves is free for another only at the next
assignment: in between, rows that still point to it find nobody there, and never a stranger.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from nestnet.compile.tables import LINK_BACK, LINK_FORTH, MACHINE, PORT_IN, PORT_OUT, Tables
from nestnet.model.values import World

# What has slots, and in which array. Machines and ports that are hosts share the array `host`.
SPACES = {
    "network": "network",
    "segment": "segment",
    "router": "router",
    "port": "port",
    "machine": "machine",
    "host_machine": "host",
    "host_port": "host",
    "port_out": "bucket",
    "port_in": "bucket",
    "link_forth": "bucket",
    "link_back": "bucket",
}
BUCKETS = {"port_out": PORT_OUT, "port_in": PORT_IN, "link_forth": LINK_FORTH, "link_back": LINK_BACK}

Key = tuple[str, int]  # ("port", id), ("host_machine", id of a machine) ...


@dataclass(frozen=True)
class Slots:
    of: Mapping[Key, int] = field(default_factory=dict)

    def __getitem__(self, key: Key) -> int:
        return self.of[key]

    def get(self, key: Key) -> int:
        """The slot, or 0: nobody."""
        return self.of.get(key, 0)

    def ids(self, space: str) -> dict[int, int]:
        """slot -> id, for one kind."""
        return {slot: id for (kind, id), slot in self.of.items() if kind == space}


def wanted(world: World) -> Iterable[Key]:
    """Everything in this world that needs a slot."""
    yield from (key for key in world.values if key[0] in SPACES)
    for machine in world.machines:
        yield "host_machine", machine
    for port in world.ports.values():
        if port.hosts or port.other:
            yield "host_port", port.id
        if port.rate:
            yield "port_out", port.id
            yield "port_in", port.id
    for link in world.links.values():
        if link.rate:
            yield "link_forth", link.id
            yield "link_back", link.id


def assign(slots: Slots, world: World) -> Slots:
    """Keep the slot of all that stays, give the lowest that nobody had to all that is new."""
    want = set(wanted(world))
    return _assigned(slots, slots.of.keys() - want, want - slots.of.keys())


def assign_in(slots: Slots, old: World, new: World) -> Slots:
    """The same, when what has slots was the one part of a world and is the other: see part.py."""
    had, want = set(wanted(old)), set(wanted(new))
    return _assigned(slots, had - want, want - had)


def _assigned(slots: Slots, gone: Collection[Key], added: Collection[Key]) -> Slots:
    if not gone and not added:
        return slots
    of = dict(slots.of)
    for key in gone:
        del of[key]
    used: dict[str, set[int]] = {}
    spaces = {SPACES[kind] for kind, _ in added}
    for (kind, _), slot in slots.of.items() if spaces else ():  # also those just left: see above
        if (space := SPACES[kind]) in spaces:
            used.setdefault(space, set()).add(slot)
    following = dict.fromkeys(spaces, 1)
    for key in sorted(added):
        space = SPACES[key[0]]
        slot, taken = following[space], used.get(space, ())
        while slot in taken:
            slot += 1
        of[key] = slot
        following[space] = slot + 1
    return Slots(of)


def slots_of(tables: Tables) -> Slots:
    """The slots that these rows were made with: what an agent that was restarted finds in the kernel."""
    found: dict[Key, int] = {}
    for kind in ("network", "segment", "router", "port", "machine"):
        for row in tables[kind]:
            found[kind, int(row["value"]["id"])] = int(row["key"])
    for row in tables["host"]:
        kind = "host_machine" if row["value"]["kind"] == MACHINE else "host_port"
        found[kind, int(row["value"]["id"])] = int(row["key"])
    kinds = {number: kind for kind, number in BUCKETS.items()}
    for row in tables["bucket"]:
        found[kinds[int(row["value"]["kind"])], int(row["value"]["id"])] = int(row["key"])
    return Slots(found)
