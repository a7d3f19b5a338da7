"""Five levels deep, with real packets: examples/turtles.yaml, its trace, and the drawing of docs/recursion.md.

The drawing says what a run said: scripts/draw makes it anew.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_files import ROOT, same
from test_lab import leftovers, nestnet
from tower_drawing import Level, svg

from nestnet.model import packet as pk

pytestmark = pytest.mark.root
PATH = "cloud/reseller/customer/staging/sandbox"
LEVELS = PATH.split("/")


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    try:
        nestnet("up", str(ROOT / "examples/turtles.yaml"), "--name", name)
        yield name
    finally:
        nestnet("down", "--name", name)
    assert leftovers(name) == []


def trace(lab: str, *arguments: str) -> dict[str, Any]:
    done = nestnet("trace", *arguments, "--live", "-o", "json", "--lab", lab)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_check_is_so(lab: str) -> None:
    nestnet("test", "--lab", lab)


def test_one_header_at_every_level(lab: str) -> None:
    """The same packet at each level: as long on the wire, one VXLAN header, and the frame that was sent in it."""
    sizes = set()
    for depth in range(1, len(LEVELS) + 1):
        path = "/".join(LEVELS[:depth])
        told = trace(lab, f"{path}/a", f"{path}/b", "--icmp")
        assert told["verdict"] == "deliver"
        assert [step["layer"] for step in told["steps"] if step["step"] == "host"] == [
            "/".join(LEVELS[:below]) for below in range(depth - 1, 0, -1)
        ]
        live = told["live"]
        assert live["delivered"] == [f"port {path}/b"]
        places = [(one["what"], one["place"]) for one in live["seen"]]
        assert places == [("leaves", "m1 eth0"), ("reaches", "m2 eth0"), ("reaches", f"port {path}/b")]
        assert live["seen"][0]["frame"] == live["seen"][1]["frame"]
        datagram = bytes.fromhex(live["seen"][0]["frame"])
        carried = pk.decapsulate(pk.parse(datagram))
        assert carried is not None
        inner = pk.parse(carried.frame)
        assert not inner.is_carriage, "there is no header in it that belongs to a level between"
        assert carried.frame == bytes.fromhex(live["seen"][2]["frame"])
        # What the trace says is on the wire is there, but for what the workload chose: identification, payload, port.
        said = {part["header"]: bytes.fromhex(part["bytes"]) for part in wire(told)["headers"][:4]}
        assert datagram[14 + 12 : 14 + 20] == said["IPv4"][12:20]
        assert datagram[14 + 20 + 8 : 14 + 20 + 16] == said["VXLAN"]
        assert datagram[14 + 36 : 14 + 36 + 14] == said["Ethernet"]
        sizes.add(len(datagram) - len(carried.frame))
    assert sizes == {50}


def wire(told: dict[str, Any]) -> dict[str, Any]:
    (step,) = (step for step in told["steps"] if step["step"] == "wire")
    return dict(step)


def test_what_a_carrier_denies_is_dropped_where_it_is_sent(lab: str) -> None:
    told = trace(lab, f"{PATH}/b", f"{PATH}/c", "--icmp")
    assert (told["verdict"], told["reason"]) == ("drop", "carrier_policy")
    assert told["steps"][-1]["network"] == "cloud/reseller/customer/staging"
    live = told["live"]
    assert (live["seen"], live["delivered"]) == ([], [])
    assert {(one["machine"], one["reason"]) for one in live["dropped"]} == {("m2", "carrier_policy")}


def test_the_drawing_says_what_a_run_says(lab: str) -> None:
    """docs/turtles.svg: the levels of a packet that arrives, and where one that does not is stopped."""
    runs = []
    for target in ("b", "c"):
        told = trace(lab, f"{PATH}/a", f"{PATH}/{target}", "--tcp", "80")
        levels = [
            Level(layer, [step["text"] for step in told["steps"] if step["layer"] == layer and step["step"] in SHOWN])
            for layer in dict.fromkeys(step["layer"] for step in told["steps"])
        ]
        headers = (
            [(part["header"], len(part["bytes"].split())) for part in wire(told)["headers"]] if target == "b" else []
        )
        verdict = f"{told['verdict']}: {told['reason'] or told['detail']}"
        runs.append((f"nestnet trace .../sandbox/a .../sandbox/{target} --tcp 80", levels, headers, verdict))
    same(Path(ROOT, "docs", "turtles.svg"), svg(runs))


SHOWN = ("host", "policy", "carry", "encapsulate")
