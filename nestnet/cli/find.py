"""Which controller a command talks to, and where its machines and workloads are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestnet.model.errors import Conflict, NestnetError, NotFound, Unreachable

if TYPE_CHECKING:
    from nestnet.api.client import Client
    from nestnet.cli.contexts import Context
    from nestnet.lab.state import Lab

VARIABLE = "NESTNET_CONTROLLER"


@dataclass(frozen=True, slots=True)
class Target:
    """A controller's URL, and the lab it belongs to if it is one of this computer's."""

    url: str
    lab: Lab | None = None
    context: Context | None = None

    def client(self) -> Client:
        from nestnet.api.client import ANONYMOUS, Client

        return Client(self.url, credentials=self.context.credentials() if self.context is not None else ANONYMOUS)


def target(name: str | None) -> Target:
    """The controller that is meant: the lab or context of that name, $NESTNET_CONTROLLER, or the only one of these: a
    lab that is up, the current context, this computer's own controller.

    Raises NotFound for a name that is neither, Conflict when there are several and none is named, Unreachable when
    there is none at all.
    """
    from nestnet.cli import contexts
    from nestnet.cli.settings import SOCKET
    from nestnet.lab import state

    names = state.labs()
    if name is None:
        if url := os.environ.get(VARIABLE):
            lab = next((lab for lab in map(state.load, names) if lab and lab.controller == url), None)
            return Target(url, lab, contexts.Context(url, os.environ.get("NESTNET_TOKEN"), _authority()))
        current = contexts.current()
        if current is not None and names:
            raise Conflict(
                f"the context {current} is in use, and labs are up: {', '.join(names)}; choose one with --context",
                "several_labs",
                [current, *names],
            )
        name = current or state.only_lab(names)
        if name is None:
            if SOCKET.exists():
                return Target(f"unix:{SOCKET}")
            raise Unreachable(f"no lab is up and {VARIABLE} is not set: `nestnet up FILE` starts one")
    lab = state.load(name)
    if lab is not None:
        return Target(lab.controller, lab)
    if (context := contexts.load(name)) is not None:
        return Target(context.controller, context=context)
    raise NotFound(f"lab or context {name}", _nearest(name, [*names, *contexts.names()]))


def _authority() -> str | None:
    """What $NESTNET_AUTHORITY, a file, says: the certificate to trust over TLS."""
    file = os.environ.get("NESTNET_AUTHORITY")
    try:
        return Path(file).read_text() if file else None
    except FileNotFoundError:
        raise NotFound(f"file {file}, which NESTNET_AUTHORITY names,") from None


def _nearest(name: str, names: list[str]) -> str | None:
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, names, 1, 0.5)), None)


@dataclass(frozen=True, slots=True)
class Place:
    """Somewhere to run a command or to look at packets: a namespace, and the interface that matters in it. `outside`:
    that is the machine's, and what the workload gets is what goes out there."""

    what: str
    namespace: str
    interface: str = "eth0"
    outside: bool = False

    @property
    def path(self) -> Path:
        from nestnet.agent import netns

        return netns.path(self.namespace)


def place(found: Target, name: str, to_look: bool = False) -> Place:
    """The namespace of a machine (`m1`) or of a port's workload (`acme/web1`). Ids serve as well.

    `to_look`: only packets matter, so a tap will do. Raises NotFound for a name that is neither, Conflict for one that
    has no workload on this computer.
    """
    lab = needs_lab(found)
    machine = next((seat.name for seat in lab.machines if seat.name == name), None)
    with found.client() as client:
        if machine is None and name.startswith("machine_"):
            machine = str(client.get("machine", name)["name"])
        if machine is not None:
            nics = next((seat.nics for seat in lab.machines if seat.name == machine), ("eth0",))
            return Place(f"machine {machine}", lab.machine(machine), nics[0] if len(nics) == 1 else "any")
        if "/" not in name and not name.startswith("port_"):
            names = [seat.name for seat in lab.machines]
            near = _nearest(name, names)
            raise NotFound(f"machine {name}", near)
        return (listening if to_look else workload)(lab, client.get("port", name))


def workload(lab: Lab, port: Mapping[str, Any]) -> Place:
    """Where the workload of a port resource is. Raises Conflict when its machine has not made it (yet)."""
    from nestnet.agent import netns

    given = _hangs_on(port)
    if "tap" in given:
        raise Conflict(
            f"port {port['path']} hangs on tap {given['tap']} of {port['machine']}: there is no namespace to enter; "
            f"`nestnet exec {port['machine']} -- CMD` runs it on the machine",
            "no_namespace",
        )
    namespace = given.get("netns") or lab.workload(int(port["row"]))
    if not netns.exists(namespace):
        raise Conflict(
            f"port {port['path']} has no workload on {port['machine']}: `nestnet status` says what is in the way",
            "not_attached",
        )
    return Place(f"port {port['path']}", namespace, (port["attachment"] or {}).get("inside", "eth0"))


def _hangs_on(port: Mapping[str, Any]) -> dict[str, str]:
    """What a port hangs on, if that was chosen, or is that of its trunk, as the agent says."""
    told = (port["attachment"] or {}) if port["trunk"] else {}
    if "tap" in told:
        return {"tap": told["tap"]}
    return {"netns": told["namespace"]} if "namespace" in told else port["attach"] or {}


def listening(lab: Lab, port: Mapping[str, Any]) -> Place:
    """Where what a port's workload gets can be seen: on a tap from outside. Otherwise where the workload is."""
    given = _hangs_on(port)
    if "tap" not in given:
        return workload(lab, port)
    return Place(f"port {port['path']}", lab.machine(port["machine"]), given["tap"], outside=True)


def needs_lab(found: Target) -> Lab:
    """The lab on this computer that the target is. Raises NestnetError when it is none."""
    if found.lab is None:
        raise NestnetError(
            f"the machines of {found.url} are not on this computer: only those of a lab can be entered from here",
            "no_lab",
        )
    return found.lab
