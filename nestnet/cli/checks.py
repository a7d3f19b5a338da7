"""`nestnet test`: the checks of a file, with real packets, and why those failed that did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface
from typing import TYPE_CHECKING, Any

from nestnet.cli.find import Target, listening, workload
from nestnet.model.errors import NestnetError

if TYPE_CHECKING:
    from nestnet.api.client import Client
    from nestnet.lab.probe import Probe
    from nestnet.lab.state import Lab
    from nestnet.model.manifest import Check
    from nestnet.model.values import Address


@dataclass(frozen=True, slots=True)
class Result:
    """One check: what was expected, what was got (allow, deny or error), after how many ms, and on failure why."""

    source: str
    target: str
    send: str
    expect: str
    got: str
    ms: float | None = None
    why: str = ""

    @property
    def passed(self) -> bool:
        return self.got == self.expect

    def data(self) -> dict[str, Any]:
        return {
            "from": self.source,
            "to": self.target,
            "send": self.send,
            "expect": self.expect,
            "got": self.got,
            "ms": self.ms,
            "passed": self.passed,
            "why": self.why or None,
        }


def run(found: Target, lab: Lab, checks: Sequence[Check]) -> list[Result]:
    """Run all checks at once. Raises NotFound or Conflict when a port of one is not there."""
    from nestnet.lab import probe

    with found.client() as client:
        paths = {path for check in checks for path in (check.source, check.target)}
        ports = {path: client.get("port", path) for path in sorted(paths)}
        senders = {path: workload(lab, ports[path]).path for path in {check.source for check in checks}}
        places = {path: listening(lab, ports[path]) for path in {check.target for check in checks}}
        witnesses = {path: probe.Witness(at.path, at.interface, at.outside) for path, at in places.items()}
        probes: dict[int, Probe] = {}
        for index, check in enumerate(checks):
            address = _address(ports[check.source], ports[check.target])
            if address is not None:
                protocol, _, number = check.send.partition("/")
                probes[index] = probe.Probe(
                    senders[check.source], witnesses[check.target], address, protocol, int(number or 0)
                )
        seen = dict(zip(probes, probe.run(list(probes.values())), strict=True))
        return [_judged(client, check, seen.get(index), probes.get(index)) for index, check in enumerate(checks)]


def _address(source: Mapping[str, Any], target: Mapping[str, Any]) -> Address | None:
    """The first address of the target in a family that the source has too."""
    families = {ip_interface(text).version for text in source["addresses"]}
    addresses = (ip_interface(text).ip for text in target["addresses"])
    return next((address for address in addresses if address.version in families), None)


def _judged(client: Client, check: Check, seen: Any, probe: Probe | None) -> Result:
    if seen is None or probe is None:
        why = "the two have no address of one family"
        return Result(check.source, check.target, check.send, check.expect, "deny", None, why)
    got = "allow" if seen.arrived else "deny"
    if got == check.expect:
        return Result(check.source, check.target, check.send, check.expect, got, seen.ms)
    why = f"could not be sent: {seen.error}" if seen.error else _why(client, check, probe)
    return Result(check.source, check.target, check.send, check.expect, got, seen.ms, why)


def _why(client: Client, check: Check, probe: Probe) -> str:
    """What the controller's tables say about the packet: the step that decided it."""
    from nestnet.cli.traces import verdict

    try:
        trace = client.trace(check.source, str(ip_address(probe.address)), probe.protocol, probe.port)
    except NestnetError as error:
        return f"no trace: {error}"
    return verdict(trace)
