"""The verbs that change something: up, down, plan, apply, delete, link, attach, detach, move."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestnet.cli import files, plans
from nestnet.cli.find import Target, target
from nestnet.cli.formats import Format
from nestnet.cli.kinds import singular
from nestnet.model.errors import Conflict, NestnetError, Usage

if TYPE_CHECKING:
    from nestnet.api.client import Client
    from nestnet.file import Document
    from nestnet.lab.state import Lab


def say(text: str) -> None:
    """Something for a person, who may not be reading: to stderr."""
    print(text, file=sys.stderr, flush=True)


def of(told: Mapping[str, Any], before: str = "") -> str:
    """The revision of a change, for those who may see it."""
    if told["revision"] is None:
        return ""
    return f"{before}revision {told['revision']}{'' if before else ' '}"


def up(file: str, name: str | None, timeout: float) -> None:
    """Make a lab of a file; all of it or nothing."""
    from nestnet.lab.up import up as bring_up
    from nestnet.model.manifest import read_name

    start = time.monotonic()
    document = files.read(file, alone=True)
    given = name is not None
    name = name if name is not None else _name_of(file)
    try:
        read_name(name)
    except ValueError as error:
        hint = "" if given else "; give one with --name"
        raise NestnetError(f"the lab's name: {error}{hint}", "bad_name") from None

    def apply_to(lab: Lab) -> None:
        say("file")
        _apply(Target(lab.controller, lab), document, prune=False, wait=True, timeout=timeout)

    where = "" if file == "-" else str(Path(file).resolve())
    with files.shown_in(document):
        lab = bring_up(files.manifest(document), name, where, apply_to, say)
    say(f"lab {name} is up: {len(lab.machines)} machines, {time.monotonic() - start:.1f} s")


def _name_of(file: str) -> str:
    """A lab's name from its file's: 'My Net.yaml' -> 'my-net'."""
    if file == "-":
        return "lab"
    return re.sub(r"[^a-z0-9]+", "-", Path(file).stem.lower()).strip("-")[:63].strip("-") or "lab"


def down(name: str | None, every: bool) -> None:
    """Take a lab away, the only one, or all. Nothing up is no failure."""
    from nestnet.lab import state
    from nestnet.lab.down import down as take_down

    up_now = state.labs()
    if name is None and len(up_now) > 1 and not every:
        raise Conflict(f"several labs are up: {', '.join(up_now)}; choose one with --name, or --all", "several_labs")
    failed: list[str] = []
    for each in up_now if every or name is None else [name]:
        removed = take_down(each)
        failed += removed.problems
        if removed:
            counts = f"{removed.processes} processes, {removed.namespaces} namespaces, {removed.pins} pins"
            say(f"lab {each} is down: {counts}")
        else:
            say(f"lab {each} was not up")
    if not up_now and name is None:
        say("no lab is up")
    if failed:
        raise NestnetError("\n".join(["some of it is still there; run it again:", *failed]), "down")


def plan(file: str, lab: str | None, prune: bool, output: Format) -> bool:
    """Show a plan. True when there is something to change."""
    document = files.read(file)
    with target(lab).client() as client, files.shown_in(document):
        made = client.plan(files.body(document), prune)
    _show(made, "Plan", output)
    return bool(made["changes"])


def apply(file: str, lab: str | None, prune: bool, wait: bool, timeout: float, output: Format) -> None:
    """Apply a file, wait until it is so, and say how long that took."""
    start = time.monotonic()
    document = files.read(file)
    applied = _apply(target(lab), document, prune, wait, timeout)
    _show({**applied["plan"], "revision": applied["revision"]}, "Applied", output)
    done = "realised" if wait else "stored"
    say(f"{of(applied)}{done} in {time.monotonic() - start:.2f} s")


def _apply(found: Target, document: Document, prune: bool, wait: bool, timeout: float) -> dict[str, Any]:
    from nestnet.cli.waiting import until_realised

    with found.client() as client:
        with files.shown_in(document):
            applied: dict[str, Any] = client.apply(files.body(document), prune)
        if wait and applied["plan"]["machines"]:
            until_realised(client, applied, applied["plan"]["machines"], timeout, found.lab)
    return applied


def delete(kind: str, path: str, cascade: bool, lab: str | None, wait: bool, timeout: float) -> None:
    """Delete one object, and wait until no machine has it."""
    from nestnet.cli.waiting import until_realised

    kind = singular(kind)
    if kind == "host":
        raise Usage("a host is a machine or a port: delete that")
    if kind == "grant":
        raise Usage("a grant is taken back by `nestnet revoke`")
    if cascade and kind not in ("network", "tenant"):
        raise Usage(f"--cascade is for networks and tenants: delete what needs the {kind} first")
    found = target(lab)
    if kind == "token":
        with found.client() as client:
            client.revoke(path)
        say(f"token {path} is revoked")
        return
    with found.client() as client:
        concerned = _concerned(client, kind, path) if wait else set()
        told = client.delete(kind, path, cascade)
        until_realised(client, told, concerned, timeout, found.lab)
    say(f"{kind} {path} deleted{of(told, ', revision ')}")


def link(path: str, up: bool, lab: str | None, wait: bool, timeout: float) -> None:
    """Take a link up or down, wait until every machine routes so, and say how long that took."""
    from nestnet.cli.waiting import until_realised

    start = time.monotonic()
    found = target(lab)
    with found.client() as client:
        told = client.set_link(path, up)
        if wait:
            until_realised(client, told, told["machines"], timeout, found.lab)
    done = "realised" if wait else "stored"
    changed = told["link"]
    say(f"link {changed['path']} is {'up' if changed['up'] else 'down'}")
    say(f"{of(told)}{done} in {time.monotonic() - start:.2f} s")


def enable(kind: str, path: str, enabled: bool, lab: str | None, wait: bool, timeout: float) -> None:
    """Take a network or port up or down, wait until every machine has it so, and say how long that took."""
    from nestnet.cli.waiting import until_realised

    kind = singular(kind)
    if kind not in ("network", "port"):
        raise Usage(f"a {kind} cannot be {'enabled' if enabled else 'disabled'}: only a network or a port")
    start = time.monotonic()
    found = target(lab)
    with found.client() as client:
        told = client.set_enabled(kind, path, enabled)
        if wait:
            until_realised(client, told, told["machines"], timeout, found.lab)
    done = "realised" if wait else "stored"
    say(f"{kind} {told[kind]['path']} is {'enabled' if told[kind]['enabled'] else 'disabled'}")
    say(f"{of(told)}{done} in {time.monotonic() - start:.2f} s")


def recarry(path: str, carrier: str | None, hosts: dict[str, str], lab: str | None, wait: bool, timeout: float) -> None:
    """Give a network another carrier, None: the wire, wait until no machine has it as it was, and say how long that
    took."""
    from nestnet.cli.waiting import until_realised

    start = time.monotonic()
    found = target(lab)
    with found.client() as client:
        told = client.recarry(path, carrier, hosts)
        if wait:
            until_realised(client, told, told["machines"], timeout, found.lab)
    done = "realised" if wait else "stored"
    network = told["network"]
    say(f"network {network['path']} is carried by {network['carrier'] or 'the wire'}")
    say(f"{of(told)}{done} in {time.monotonic() - start:.2f} s")


def attach(path: str, wanted: dict[str, str], lab: str | None, wait: bool, timeout: float) -> None:
    """Give a port's workload something to hang on, {"netns": NAME} or {"tap": NAME}, or take it away: {}. Wait until
    its machine has made it so."""
    from nestnet.cli.waiting import until_realised

    start = time.monotonic()
    found = target(lab)
    with found.client() as client:
        told = client.set_attach(path, wanted)
        if wait:
            until_realised(client, told, told["machines"], timeout, found.lab)
    done = "realised" if wait else "stored"
    port = told["port"]
    if wanted:
        say(f"port {port['path']} hangs on {' '.join(*wanted.items())} of {port['machine']}")
    else:
        say(f"port {port['path']} is detached")
    say(f"{of(told)}{done} in {time.monotonic() - start:.2f} s")


def move(path: str, to: str, lab: str | None, wait: bool, timeout: float) -> None:
    """Move a port to another host under traffic, wait until it lives there and nowhere else, and say how long that
    took."""
    from nestnet.cli.waiting import until_moved, until_realised

    start = time.monotonic()
    found = target(lab)
    with found.client() as client:
        told = client.move(path, to)
        port = told["port"]
        for line in told["disturbs"]:
            say(line)
        if wait and port["moving"] is None:  # from host to host of one machine
            until_realised(client, told, told["machines"], timeout, found.lab)
        elif wait:
            until_moved(client, port, to, timeout)
    what = "moved" if wait else "is moving"
    say(f"port {port['path']} {what} to {to}, {time.monotonic() - start:.2f} s")


def _concerned(client: Client, kind: str, path: str) -> set[str]:
    """The machines that hold something of the network that an object is in, so will hear that it is gone."""
    found = client.get(kind, path)
    if kind == "tenant":
        return _of_tenants(client, found["name"])
    if kind == "machine":
        return {machine["name"] for machine in client.list("machine")} - {found["name"]}
    network = found["path"] if kind == "network" else found["network"]
    ports = list(client.list("port"))
    return {port["machine"] for port in ports if f"{port['network']}/".startswith(f"{network}/")}


def _of_tenants(client: Client, name: str) -> set[str]:
    """The machines that hold something of a tenant's networks, or of those below it: as far as they are seen."""
    parents = {one["name"]: one["parent"] for one in client.list("tenant")}
    names = [name]
    for above in names:
        names += [each for each, parent in parents.items() if parent == above]
    networks = [one["path"] for one in client.list("network") if one["tenant"] in names]
    inside = tuple(f"{path}/" for path in networks)
    return {port["machine"] for port in client.list("port") if f"{port['network']}/".startswith(inside)}


def _show(plan: dict[str, Any], kind: str, output: Format) -> None:
    from nestnet.cli import output as out

    if output in (Format.json, Format.yaml):
        out.data(out.versioned(kind, plan), output)
    elif output is Format.name:
        for change in plan["changes"]:
            print(change["path"])
    else:
        plans.show(plan)
