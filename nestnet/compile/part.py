"""The part of a world that a change is about: what is outside has the same rows before and after.

    parts(old, new) -> (part of old, part of new)
    diff(compile(part of old), compile(part of new))

A network's rows hang on what is in it and on what carries it: where its ports live, whether a limit is on the way. So a
change concerns its network and all that is carried by that; the networks below come along to be asked, and have the
same rows in both parts. A machine's rows hang on it alone. What a machine pays for a change is then that change's part,
not all that lives there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from nestnet.model.values import FABRIC, Machine, Network, Port, Value, World


def parts(old: World, new: World, machine: int, ports: Iterable[int] = ()) -> tuple[World, World]:
    """What of two worlds may be compiled otherwise, the networks that carry it, and the machines that it lives on,
    `machine` among them, which must be the same in both. `ports` hang on another interface than before."""
    before, after = old.values, new.values
    changed = [value for key, value in after.items() if (was := before.get(key)) is not value and was != value]
    changed += [value for key, value in before.items() if (now := after.get(key)) is not value and now != value]
    changed += [world.ports[id] for world in (old, new) for id in ports if id in world.ports]
    above: dict[int, set[int]] = defaultdict(set)
    for world in (old, new):
        for network in world.networks.values():
            above[network.carrier].add(network.id)
    concerned = list({_network(value) for value in changed} - {FABRIC})
    known = set(concerned)
    for id in concerned:
        more = above[id] - known
        known |= more
        concerned += more
    for world in (old, new):
        for id in concerned:
            while (found := world.networks.get(id)) is not None and found.carrier != FABRIC:
                known.add(id := found.carrier)
    inside = [[(key, value) for key, value in world.values.items() if _network(value) in known] for world in (old, new)]
    machines = {machine, *(value.id for value in changed if isinstance(value, Machine))}
    for _, value in (*inside[0], *inside[1]):
        if isinstance(value, Port):
            machines |= {value.host, value.other}
    keys = [("machine", id) for id in machines]
    for values, world in zip(inside, (old, new), strict=True):
        values += [(key, world.values[key]) for key in keys if key in world.values]
    return World(dict(inside[0])), World(dict(inside[1]))


def _network(value: Value) -> int:
    """The network that it is in; a machine is in none."""
    if isinstance(value, Machine):
        return FABRIC
    return value.id if isinstance(value, Network) else value.network
