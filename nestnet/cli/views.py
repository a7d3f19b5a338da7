"""The verbs that show something: get, describe, trace, status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestnet.cli import output as out
from nestnet.cli.find import Target, target
from nestnet.cli.formats import Format
from nestnet.cli.kinds import singular
from nestnet.model.errors import NestnetError, NotFound, Usage

if TYPE_CHECKING:
    from nestnet.cli.traces import Places


def get(kind: str, path: str | None, network: str | None, lab: str | None, output: Format) -> None:
    """List the objects of a kind, or show one."""
    kind = singular(kind)
    with target(lab).client() as client:
        if kind == "token":
            found = [one for one in client.tokens() if path in (None, one["name"])]
            if path is not None and not found:
                raise NotFound(f"token {path}")
            out.resources(kind, found, output, single=path is not None)
        elif kind == "grant":
            found = [one for one in client.grants() if path in (None, one["name"], one["id"])]
            if path is not None and not found:
                raise NotFound(f"grant {path}")
            out.resources(kind, found, output, single=path is not None)
        elif kind == "host":  # of the fabric, or of a network: PATH is that
            if path is not None and network is not None:
                raise Usage("give the network once")
            out.resources(kind, list(client.list(kind, network=path or network)), output)
        elif path is not None:
            out.resources(kind, [client.get(kind, path)], output, single=True)
        else:
            out.resources(kind, list(client.list(kind, network=network)), output)


def describe(kind: str, path: str, lab: str | None) -> None:
    """Show everything about one object."""
    kind = singular(kind)
    if kind == "token":
        raise Usage("a token has no more to show: `nestnet get token NAME -o yaml`")
    if kind == "host":
        raise Usage("a host is a machine or a port: describe that")
    if kind == "grant":
        raise Usage("a grant has no more to show: `nestnet get grant NAME -o yaml`")
    with target(lab).client() as client:
        out.described(client.get(kind, path))


def trace(port: str, to: str, protocol: str, number: int | None, live: bool, lab: str | None, output: Format) -> None:
    """Tell what happens to a packet. `to` is an address, or the path of a port whose address is meant. `live`: send
    one, too, and tell where it went."""
    from ipaddress import ip_address, ip_interface

    from nestnet.cli import traces

    found = target(lab)
    with found.client() as client:
        try:
            address = str(ip_address(to))
        except ValueError:
            address = str(ip_interface(client.get("port", to)["addresses"][0]).ip)
        told = client.trace(port, address, protocol, number or 0)
    if live:
        from nestnet.cli.live import follow

        told["live"] = follow(found, port, address, protocol, number or 0)
    if output in (Format.json, Format.yaml):
        out.data(out.versioned("Trace", told), output)
    else:
        print(traces.text(told, _places(found)))
        if live:
            from nestnet.cli.live import text

            print(text(told["live"]))


def _places(found: Target) -> Places:
    """Where the lab's file has its policies; nowhere when it cannot be read any more."""
    from nestnet.cli import files, traces

    if found.lab is None or not found.lab.file:
        return {}
    try:
        return traces.places(files.read(found.lab.file))
    except NestnetError:
        return {}


def status(lab: str | None, output: Format) -> bool:
    """Show how the machines are. True when all is well."""
    from nestnet.cli import statuses

    meant = target(lab)
    with meant.client() as client:
        found, ports, networks = client.status(), list(client.list("port")), list(client.list("network"))
    # Of a lab it is known at once that an agent has ended; of others, when its reports stay away.
    for machine in found["machines"]:
        if meant.lab is not None and not meant.lab.has_agent(machine["name"]):
            machine["problems"] = [*machine["problems"], f"its agent has ended: the log is in {meant.lab.logs}"]
    if output in (Format.json, Format.yaml):
        wrong = statuses.problems(found)
        more = {"drops": dict(statuses.drops(ports)), "down": statuses.down(networks, ports)}
        out.data(out.versioned("Status", {**found, "well": not wrong, **more}), output)
        return not wrong
    return statuses.show(found, ports, networks)
