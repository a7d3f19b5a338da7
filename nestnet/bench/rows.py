"""What is measured by `nestnet bench`: a table of rows, each with its beds, its traffic, and what it must reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

from nestnet.bench import crowd, depth, neighbours, ovs
from nestnet.bench.beds import BEDS
from nestnet.bench.traffic import Bed

Beds = Callable[[], AbstractContextManager[dict[str, Bed]]]

LIMIT, PEER, OURS = "limit", "peer", "nestnet"


@dataclass(frozen=True)
class Wanted:
    """The median of `path` to `below`, in traffic of this kind, must be `least`, unless that is None, and shall be
    `aim`. `even`: it is enough if the interval has 1 in it."""

    kind: str
    path: str
    below: str
    least: float | None = None
    aim: float | None = None
    even: bool = False


@dataclass(frozen=True)
class Row:
    """`paths` says what each bed is; `reference` is what the table's ratios are to, `again` the path that is measured
    twice. `rounds` of --rounds 80. `missed`: why what is missed is missed, and what was tried."""

    name: str
    title: str
    beds: Beds
    paths: dict[str, str]
    kinds: tuple[str, ...]
    reference: str
    again: str
    wanted: tuple[Wanted, ...]
    rounds: int = 80
    missed: str = ""


def beds(**names: str) -> Beds:
    """Beds of beds.py, under the names that they have here."""

    @contextmanager
    def made() -> Iterator[dict[str, Bed]]:
        with ExitStack() as stack:
            yield {path: stack.enter_context(BEDS[name]()) for path, name in names.items()}

    return made


@contextmanager
def switches() -> Iterator[dict[str, Bed]]:
    with ExitStack() as stack:
        made = {PEER: ovs.ovs(), OURS: BEDS["ours"]()}
        yield {path: stack.enter_context(bed) for path, bed in made.items()}


def against(kind: str, limit: tuple[float, float] | None, peer: tuple[float, float]) -> tuple[Wanted, ...]:
    """What must be reached of the limit and of the peer, each with its aim."""
    to_peer = Wanted(kind, OURS, PEER, *peer)
    return (Wanted(kind, OURS, LIMIT, *limit), to_peer) if limit else (to_peer,)


DEEPEST = f"level {max(depth.DEPTHS)}"
FARTHEST = depth.said(max(depth.HOPS))
NONE, *MANY = (crowd.said(size) for size in crowd.SIZES)
BY_KIND = ("request", "connect")
PLAIN = ("request", "stream")
CALM, LOUD = ([neighbours.said(size, what) for size in neighbours.SIZES] for what in ("idle", "flooding"))

ROWS = {
    row.name: row
    for row in (
        Row(
            "overlay",
            "From machine to machine",
            beds(limit="bare", peer="peer", nestnet="ours"),
            {
                LIMIT: "machine to machine, no overlay, no rules",
                PEER: "Linux bridge + kernel VXLAN, 10 rules in nftables",
                OURS: "nestnet, 10 policies",
            },
            ("request", "stream", "streams", "small", "connect"),
            LIMIT,
            OURS,
            (
                *against("request", (0.90, 0.97), (1.15, 1.3)),
                *against("stream", (0.85, 0.95), (1.25, 1.4)),
                *against("streams", (0.72, 0.90), (1.2, 1.4)),
                *against("small", (0.68, 0.80), (1.6, 2)),
                *against("connect", None, (1.2, 1.5)),
            ),
            missed=(
                "Requests to the limit: by `perf` a transaction, which is two packets, takes about 1.1 us more "
                "than without an overlay. Of these are, in ns: one more pass through a veth for each packet 300; "
                "the kernel's part of taking room and giving it back 150, and 90 for the copy of the head of a "
                "TCP packet that its sender still holds (`skb_unclone`, which nothing that takes bytes off can "
                "avoid); redirects 150; entering four programs through retpolines 90. The rest is the programs': "
                "[what was tried on them](decisions/2026-11-28-flows-at-hand.md). A netkit device would save the "
                "pass; this kernel has none.\n\n"
                "Streams to the peer: what this row measures here is how much TCP sends again, not what a datapath "
                "costs. Packets of one connection are sent by two CPUs, that of the sender and that on which the "
                "acknowledgement came in (or the timer of BBR, which this computer paces by): they overtake each other "
                "in the queues that veths have for each CPU, which TCP takes for loss. In three seconds on a quiet "
                "computer a wire without an overlay carried 24 Gb/s with 30,000 segments sent again; the same two "
                "ends, with Reno's congestion control instead and by luck none, 110 Gb/s; nestnet 18 with 14,000, and "
                "71 with none; the peer, whose device has a queue of its own behind it, 36 with 2,400, and 55 with "
                "none: 1.28 times the peer where nothing is sent again. Tried, and none of it steady (A/A 0.15 to "
                "1.3): cubic and Reno, a CPU for each end, both ends on one, bounded receive buffers. So the row stays "
                "as it was.\n\n"
                "New connections to the peer: each is eight packets out and eight in, and the first of each way is "
                "judged, composed and remembered on both machines. By the kernel's own count (`bpf_stats_enabled`) "
                "the programs take 11.3 us of the 36 that one takes while little is remembered: 28,000 a second, "
                "1.33 times the peer's 21,000. When some hundred thousand are, they take 13.3: rows of connections "
                "and flows are found in memory then, not in the cache; 26,000, 1.24 times. In turns with a second "
                "pair of machines that has such tables of its own, as here, each finds the cache full of the "
                "other's: 24,000. Tried: agents that look through these tables for a fiftieth of their time, not a "
                "twentieth (1.186 and 1.188)."
            ),
        ),
        Row(
            "rules",
            "New connections, by how many rules there are",
            beds(few="ours", many="ours1000", peer="peer1000"),
            {
                "few": "nestnet, 10 policies",
                "many": "nestnet, 1,000 policies",
                PEER: "Linux bridge + kernel VXLAN, 1,000 rules as a set of nftables",
            },
            ("connect",),
            "few",
            "few",
            (Wanted("connect", "many", "few", 0.95), Wanted("connect", "many", PEER, 1.2, 1.5)),
            rounds=60,
        ),
        Row(
            "machine",
            "On one machine",
            beds(limit="pair", peer="bridge", nestnet="machine"),
            {
                LIMIT: "one veth from workload to workload, no rules",
                PEER: "Linux bridge, 10 rules in nftables",
                OURS: "nestnet, 10 policies",
            },
            PLAIN,
            LIMIT,
            OURS,
            (*against("request", (0.93, 0.97), (1.0, 1.1)), *against("stream", (0.93, 0.97), (1.0, 1.1))),
            rounds=60,
            missed=(
                "Streams to the peer: limit, peer and nestnet carry the same here, what one CPU copies from socket "
                "to socket, about 16 Gb/s each; in four runs the ratio was 0.994 to 1.011, with 1 in its interval "
                "and as much between nestnet and itself. Requests to the limit were 0.926 to 0.935 in these runs: "
                "what is left is two redirects and four programs, as from machine to machine."
            ),
        ),
        Row(
            "networks",
            "By how many networks there are on the machines",
            crowd.crowds,
            {crowd.said(size): f"{crowd.said(size)} in the maps" for size in crowd.SIZES},
            BY_KIND,
            NONE,
            NONE,
            tuple(Wanted(kind, many, NONE, 0.95, 0.98) for kind in BY_KIND for many in MANY),
            rounds=25,
        ),
        Row(
            "depth",
            "By how deep the network is carried",
            depth.levels,
            {f"level {n}": f"nestnet, level {n}" for n in depth.DEPTHS}
            | {f"{n} VXLAN devices": f"{n} kernel VXLAN device{'s on each other' if n > 1 else ''}" for n in (1, 2, 3)},
            PLAIN,
            "level 1",
            "level 1",
            tuple(Wanted(kind, DEEPEST, "level 1", 0.97, even=True) for kind in PLAIN),
            rounds=25,
        ),
        Row(
            "hops",
            "By how many routers are on the way",
            depth.hops,
            {depth.said(n): f"nestnet, {depth.said(n)}" for n in depth.HOPS},
            PLAIN,
            depth.said(1),
            depth.said(1),
            tuple(Wanted(kind, FARTHEST, depth.said(1), 0.97, even=True) for kind in PLAIN),
            rounds=25,
        ),
        Row(
            "tags",
            "With tags of tenants",
            beds(none="ends", trunk="trunk", riding="riding"),
            {
                "none": "nestnet, no tags",
                "trunk": "nestnet, workloads behind a tag of a trunk",
                "riding": "nestnet, tags that ride in a transparent segment",
            },
            PLAIN,
            "none",
            "none",
            tuple(Wanted(kind, path, "none", 0.95) for kind in PLAIN for path in ("trunk", "riding")),
            rounds=25,
        ),
        Row(
            "underlay",
            "By what the wire is",
            beds(ipv4="ours", ipv6="ours6", tagged="tagged"),
            {
                "ipv4": "nestnet, machines with IPv4 addresses",
                "ipv6": "nestnet, machines with IPv6 addresses",
                "tagged": "nestnet, machines in a VLAN of the wire",
            },
            PLAIN,
            "ipv4",
            "ipv4",
            tuple(Wanted(kind, "tagged", "ipv4", 0.95) for kind in PLAIN),
            rounds=25,
        ),
        Row(
            "ovs",
            "Open vSwitch, in userspace",
            switches,
            {
                OURS: "nestnet, 10 policies",
                PEER: "Open vSwitch and VXLAN in userspace, no rules",
            },
            PLAIN,
            OURS,
            OURS,
            tuple(Wanted(kind, OURS, PEER) for kind in PLAIN),
            rounds=20,
        ),
        Row(
            "neighbours",
            "Beside neighbours in other networks, idle and flooding",
            neighbours.beds,
            {"alone": "nestnet, nobody beside"}
            | {path: f"nestnet, {path}" for path in (*CALM, *LOUD)}
            | {
                "peer idle": f"Linux bridges + kernel VXLAN + htb, {neighbours.BY_HAND} idle",
                "peer flooded": f"Linux bridges + kernel VXLAN + htb, {neighbours.BY_HAND} flooding",
            },
            ("request", "hurried", "connect"),
            "alone",
            "alone",
            tuple(Wanted("request", path, "alone", 0.9, 0.95) for path in (*CALM, *LOUD))
            + tuple(Wanted("hurried", path, "alone", 1 / 2, 1 / 1.5) for path in (*CALM, *LOUD))
            + tuple(Wanted("connect", path, "alone", 0.9, 0.95) for path in (*CALM, *LOUD)),
            rounds=15,
        ),
    )
}
QUICK = ("overlay", "rules", "machine")
