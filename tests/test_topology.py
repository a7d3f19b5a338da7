"""`nestnet import topology`: golden files, limits, any text at all, and every graph of the Internet Topology Zoo.

tests/golden/topologies/NAME.json and NAME.graphml are graphs, NAME.txt is what goes to stderr, NAME.yaml the network
file. scripts/golden rewrites both, and the examples that are made from graphs.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from cProfile import Profile
from functools import partial
from ipaddress import ip_network
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import topohub
from drawing import Run, svg
from golden_files import ROOT, same
from hypothesis import given, settings
from hypothesis import strategies as st

from nestnet.agent import netns
from nestnet.compile.compiler import compile
from nestnet.compile.routes import Route, routes_of
from nestnet.compile.slots import Slots, assign
from nestnet.compile.tables import Tables
from nestnet.file import load
from nestnet.file import topology as tp
from nestnet.file.topology import Imported, Refused, network, read, render
from nestnet.lab import state
from nestnet.model.manifest import LINKS_PER_NETWORK, RESERVED, ROUTES_PER_NETWORK, Manifest
from nestnet.model.validate import Known
from nestnet.model.values import MAX_HOPS, World
from nestnet.store import Store

GOLDEN = ROOT / "tests" / "golden" / "topologies"
GRAPHS = sorted(path for path in GOLDEN.iterdir() if path.suffix not in (".yaml", ".txt"))
DATA = Path(topohub.__file__).parent / "data"
ZOO = sorted((DATA / "topozoo").glob("*.json"))
SNDLIB = sorted((DATA / "sndlib").glob("*.json"))
EXAMPLES = {"abilene": DATA / "topozoo" / "Abilene.json", "geant": DATA / "topozoo" / "Geant2012.json"}
XMLNS = 'xmlns="http://graphml.graphdrawing.org/xmlns"'


def imported(path: Path, machines: int = 3) -> Imported:
    return network(read(path.read_bytes(), path.name), machines)


def tried(text: bytes, source: str) -> tuple[Imported, None] | tuple[None, Refused]:
    try:
        return network(read(text, source)), None
    except Refused as error:
        return None, error


def graph(nodes: int, edges: Any = (), **more: Any) -> bytes:
    """Node-link JSON."""
    listed = [{"source": a, "target": b} for a, b in edges]
    return json.dumps({"nodes": [{"id": i} for i in range(nodes)], "edges": listed, **more}).encode()


def refused(text: bytes, source: str = "x") -> Refused:
    with pytest.raises(Refused) as raised:
        read(text, source)
    return raised.value


def only(manifest: Manifest) -> Any:
    assert manifest.networks is not None
    return next(iter(manifest.networks.values()))


# ---- what it prints


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.name)
def test_golden_graph(path: Path) -> None:
    made, error = tried(path.read_bytes(), path.name)
    notes, text = (made.notes, render(made)) if made else ([error], "")
    for suffix, content in ((".txt", "".join(f"{note}\n" for note in notes)), (".yaml", text)):
        if content or path.with_suffix(suffix).exists():
            same(path.with_suffix(suffix), content)
    if text:
        load(text, path.name, Known())


def test_golden_no_text_without_its_graph() -> None:
    stems = [path.stem for path in GRAPHS]
    assert len(set(stems)) == len(stems)
    assert {path.stem for path in GOLDEN.iterdir()} - set(stems) == {"limit_exceeded"}


def graphml(inside: str, before: str = "") -> bytes:
    return f"{before}<graphml {XMLNS}>{inside}</graphml>".encode()


# Too large to be files: what makes each, and which limit it tells.
TOO_LARGE = {
    "50,000,001 bytes": (b"{" + b" " * tp.MAX_BYTES, tp.MAX_BYTES),
    "100,000 nodes": (graph(100_000), tp.MAX_NODES),
    "100,000 nodes in GraphML": (
        graphml("<graph>" + "".join(f'<node id="{i}"/>' for i in range(100_000)) + "</graph>"),
        tp.MAX_NODES,
    ),
    "20,001 edges": (graph(2, [(0, 1)] * 20_001), tp.MAX_EDGES),
    "20,001 edges in GraphML": (
        graphml("<graph><node id='0'/>" + "<edge source='0' target='0'/>" * 20_001 + "</graph>"),
        tp.MAX_EDGES,
    ),
    "more links than a network may have": (graph(2, [(0, 1)] * (LINKS_PER_NETWORK + 1)), LINKS_PER_NETWORK),
    "257 nodes in a ring": (graph(257, [(i, (i + 1) % 257) for i in range(257)]), ROUTES_PER_NETWORK),
    "1,000,001 elements": (graphml("<x/>" * 1_000_000), tp.MAX_ELEMENTS),
}


def test_golden_limits() -> None:
    errors = {what: refused(text) for what, (text, _) in TOO_LARGE.items()}
    same(GOLDEN / "limit_exceeded.txt", "".join(f"{what}\n    {error}\n" for what, error in errors.items()))
    for what, error in errors.items():
        assert (error.problems[0].code, error.problems[0].limit) == ("limit_exceeded", TOO_LARGE[what][1])


def test_golden_every_code_has_an_example() -> None:
    found = {path.stem: error.problems[0] for path in GRAPHS if (error := tried(path.read_bytes(), path.name)[1])}
    assert {problem.code for problem in found.values()} | {"limit_exceeded"} == set(tp.CODES)
    assert all(stem.startswith(problem.code) and problem.message.isprintable() for stem, problem in found.items())


def test_golden_page_lists_the_codes() -> None:
    page = ROOT / "docs" / "errors.md"
    before, _, rest = page.read_text().partition("<!-- graphs -->\n")
    after = rest.partition("<!-- /graphs -->\n")[2]
    rows = "".join(f"| `{code}` | {rule} |\n" for code, rule in tp.CODES.items())
    same(page, f"{before}<!-- graphs -->\n| code | the rule |\n|---|---|\n{rows}<!-- /graphs -->\n{after}")


@pytest.mark.parametrize("name", EXAMPLES)
def test_golden_examples_are_current(name: str) -> None:
    same(ROOT / "examples" / f"{name}.yaml", render(imported(EXAMPLES[name])))


# ---- the command


def command(*arguments: str, stdin: bytes = b"", cwd: Path = ROOT) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "nestnet", "import", "topology", *arguments],
        input=stdin, capture_output=True, check=False, cwd=cwd, timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_command(tmp_path: Path) -> None:
    code, out, err = command(str(EXAMPLES["abilene"]))
    assert (code, err) == (0, "")
    assert out == (ROOT / "examples" / "abilene.yaml").read_text()
    code, out, err = command("-", "--machines", "1", stdin=graph(2, [(0, 0), (0, 1)]))
    assert (code, err) == (0, "nestnet: left out: an edge from '0' to itself\n")
    assert "  stdin:\n" in out
    assert {port.host for port in only(load(out).manifest).ports.values()} == {"m1"}  # type: ignore[arg-type]
    (tmp_path / "wrong.json").write_text("{")
    code, out, err = command("wrong.json", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("wrong.json:1:2: json_syntax: ")
    assert command("none.json", cwd=tmp_path) == (1, "", "nestnet: file none.json does not exist\n")
    assert command("x.json", "--machines", "0")[0] == 2


# ---- parts


def test_ports_are_spread_in_turn_and_segments_have_prefixes_of_their_own() -> None:
    inside = only(network(read(graph(300), "x"), 7).manifest)
    assert [port.host for port in inside.ports.values()] == [f"m{i % 7 + 1}" for i in range(300)]
    cidrs = [segment.cidr[0] for segment in inside.segments.values()]
    assert cidrs == [ip_network(f"10.{i // 256}.{i % 256}.0/24") for i in range(300)]


def test_checks_of_large_graphs_and_of_islands() -> None:
    small = network(read(graph(63, [(i, i + 1) for i in range(60)]), "x"))
    checks = small.manifest.checks or ()
    assert len(checks) == 63 * 62 // 2
    assert sum(check.expect == "deny" for check in checks) == 61 + 61 + 1
    chain = network(read(graph(100, [(i, i + 1) for i in range(98)]), "x"))
    checks = chain.manifest.checks or ()
    near = [(a, b) for a, b in combinations(range(99), 2) if b - a < MAX_HOPS]
    assert [(check.source, check.target) for check in checks if check.expect == "allow"] == [
        (f"x/{a}-1", f"x/{b}-1") for a, b in near
    ]
    assert sum(check.expect == "deny" for check in checks) == 99
    assert chain.comment[2:] == ("Without checks: 666 pairs with more than 63 routers on the way.",)
    large = network(read(graph(257, [(i, i + 1) for i in range(200)]), "x"))
    assert [check.source for check in large.manifest.checks or ()] == [
        f"x/{i}-1" for i in [*range(1, 63), *range(201, 257)]
    ]
    assert large.comment[2:] == (
        "Checks between all pairs would be more than 32,640: each node is checked with the first.",
        "Without checks: 138 pairs with more than 63 routers on the way.",
    )


@pytest.mark.parametrize(
    ("nodes", "edges"),
    [
        (256, [(i, (i + 1) % 256) for i in range(256)]),
        (128, [*combinations(range(64), 2), *((i, i + 1) for i in range(63, 127))]),
        (tp.MAX_NODES, [(i * 16, i * 16 + 1 + k) for i in range(256) for k in range(15)]),
        (2, [(0, 1)] * LINKS_PER_NETWORK),
    ],
    ids=["routes", "pairs", "nodes", "links"],
)
def test_the_largest_graphs_are_files_that_are_right(nodes: int, edges: list[tuple[int, int]]) -> None:
    calls = Profile(builtins=True)
    with calls:
        made = network(read(graph(nodes, edges), "x"), 1000)
        inside = only(load(render(made), "x", Known()).manifest)  # type: ignore[arg-type]
    assert (len(inside.routers), len(inside.links)) == (nodes, len(edges))
    # Each of its nodes, links, ports and checks is met some hundreds of times, not by each other.
    assert sum(one.callcount for one in calls.getstats()) < 500 * (
        nodes + len(edges) + len(inside.ports) + len(made.manifest.checks or ())
    )


@pytest.mark.parametrize("name", ["zoo", "yed"])
def test_graphml_is_read_as_networkx_reads_it(name: str) -> None:
    path = GOLDEN / f"{name}.graphml"
    ours, theirs = imported(path), nx.read_graphml(path)
    inside = only(ours.manifest)
    assert ours.routers == {node: tp.slug(about.get("label") or node) for node, about in theirs.nodes(data=True)}
    got = sorted((*sorted(link.between), link.cost) for link in inside.links.values())
    default = theirs.graph.get("edge_default", {}).get("dist", 1)
    undirected = theirs.to_undirected() if theirs.is_directed() else theirs  # of two ways the one back is kept
    assert got == sorted(
        (*sorted((ours.routers[a], ours.routers[b])), round(dist or default))
        for a, b, dist in undirected.edges(data="dist")
    )


@pytest.mark.parametrize(
    "text",
    [
        # one entity, large and often: no depth that a limit on nesting would see
        graphml(f"<graph><node id='{'&a;' * 10_000}'/></graph>", f"<!DOCTYPE g [<!ENTITY a '{'a' * 100_000}'>]>"),
        graphml("<graph><node id='1'>&a;</node></graph>", "<!DOCTYPE g [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>"),
        graphml("", """<!DOCTYPE g [<!ENTITY % a "<!ENTITY b 'c'>"> %a;]>"""),
    ],
    ids=["quadratic", "external", "parameter"],
)
def test_entities_are_refused_before_they_are_anything(text: bytes) -> None:
    start = time.monotonic()
    assert refused(text).problems[0].code == "xml_feature"
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"[" * 1_000_000, "json_syntax"),
        (b'{"nodes": ' + b"[" * 1_000_000, "json_syntax"),
        (b'{"nodes": [{"id": 1' + b"0" * 10_000 + b"}]}", "json_syntax"),
        (b'{"\xff": 1}', "json_syntax"),
        (b"<a>" * 1_000_000, "not_a_graph"),
        (b"<graphml>" * 1_000_000, "xml_syntax"),
        (b'<?xml version="1.0" encoding="utf-7"?><graphml/>', "xml_syntax"),
        (b'<?xml version="1.0" encoding="no-such"?><graphml/>', "xml_syntax"),
        (b'<?xml version="1.0" encoding="shift_jis"?><graphml/>', "xml_syntax"),
        (b"", "not_a_graph"),
        (b"\0\0\0", "not_a_graph"),
    ],
)
def test_hostile_text(text: bytes, code: str) -> None:
    assert refused(text, "x\n\x1b[31m").problems[0].code == code
    assert str(refused(text, "x\n\x1b[31m")).isprintable()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
_IDS = st.integers(0, 5) | st.text(max_size=3) | _JSON
_NAMES = st.text(max_size=80) | st.sampled_from(["any", "hosts", "a", "a-2", "A", "a" * 70, "ä"]) | _JSON
_GRAPHS = st.fixed_dictionaries(
    {
        "nodes": st.lists(st.fixed_dictionaries({"id": _IDS}, optional={"name": _NAMES, "label": _NAMES}), max_size=8),
        "edges": st.lists(
            st.fixed_dictionaries({"source": _IDS, "target": _IDS}, optional={"dist": _JSON, "key": _JSON}), max_size=8
        ),
    },
    optional={
        "directed": st.booleans() | _JSON,
        "multigraph": st.booleans(),
        "graph": st.fixed_dictionaries({"name": _NAMES}) | _JSON,
    },
)
_RIGHT = st.integers(1, 8).flatmap(
    lambda count: st.fixed_dictionaries(
        {
            "nodes": st.lists(_NAMES, min_size=count, max_size=count).map(
                lambda names: [{"id": i, "name": name} for i, name in enumerate(names)]
            ),
            "edges": st.lists(
                st.fixed_dictionaries(
                    {"source": st.integers(0, count - 1), "target": st.integers(0, count - 1)},
                    optional={"dist": st.floats(-10, 65535) | st.integers(-10, 65535)},
                ),
                max_size=20,
            ),
            "directed": st.booleans(),
            "multigraph": st.booleans(),
            "graph": st.fixed_dictionaries({"name": _NAMES}),
        }
    )
)


def judged(text: bytes) -> Imported | None:
    """What any text may become: a file that is right, or a single problem. Nothing else is raised."""
    made, error = tried(text, "some.json")
    assert made or (error and error.problems[0].code in tp.CODES)
    assert made is None or load(render(made), "x", Known()).manifest == made.manifest
    return made


@settings(max_examples=150, deadline=None)
@given(st.one_of(_JSON, _GRAPHS))
def test_any_json(data: Any) -> None:
    judged(json.dumps(data).encode())


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_graphml(rng: random.Random) -> None:
    text = bytearray((GOLDEN / "zoo.graphml").read_bytes())
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.sample(range(len(text)), 2))
        length = min(b - a, 40)
        piece = bytes(text[a : a + length])
        text[b : b + rng.choice((0, length))] = rng.choice((piece, b"", b"<node/>", b'"', b"dist", b"&lt;"))
    judged(bytes(text))


@settings(max_examples=150, deadline=None)
@given(_RIGHT)
def test_any_graph_that_is_right(data: dict[str, Any]) -> None:
    made = judged(json.dumps(data).encode())
    assert made is not None
    inside = only(made.manifest)
    names = list(inside.routers)
    assert len(names) == len(data["nodes"]) == len(set(names))
    assert set(names).isdisjoint(RESERVED)
    assert all(
        re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name)
        for name in [*names, *inside.ports, *(inside.links or ())]
    )
    # Each pair of nodes has as many links as its edges say, whichever way they are written.
    pairs: dict[tuple[int, int], int] = {}
    for edge in data["edges"]:
        pair = edge["source"], edge["target"]
        pairs[pair] = pairs.get(pair, 0) + 1
    want: dict[frozenset[str], int] = {}
    for (a, b), there in pairs.items():
        if a != b:
            back = pairs.get((b, a), 0)
            count = 1 if not data["multigraph"] else max(there, back) if data["directed"] else there + back
            want[frozenset((made.routers[a], made.routers[b]))] = count
    have: dict[frozenset[str], int] = {}
    for link in (inside.links or {}).values():
        have[frozenset(link.between)] = have.get(frozenset(link.between), 0) + 1
    assert have == want


# ---- every graph of the Internet Topology Zoo and of SNDlib, to the tables of a machine


def compiled(made: Imported, folder: Path) -> tuple[World, dict[str, int], dict[str, int], Tables, float]:
    """What the first machine holds of it, the ids of routers and segments by name, its tables, and the seconds of CPU
    that compiling took: of a clock others have a part, when they run too."""
    manifest = load(render(made), "x", Known()).manifest
    assert manifest is not None
    store = Store(folder / "store.db")
    try:
        for number, machine in enumerate(manifest.machines or (), 1):
            store.join(machine, f"192.0.2.{number}")
        store.apply(manifest)
        world = World.of(value for _, _, value in store.snapshot_for(1).rows if value is not None)
    finally:
        store.close()
    inside = only(manifest)
    # Ids rise in the order of the file.
    routers = dict(zip(inside.routers, sorted(world.routers), strict=True))
    segments = {name: world.routers[id].interfaces[0].segment for name, id in routers.items()}
    start = time.process_time()
    tables = compile(world, 1, {}, 1, assign(Slots(), world))
    return world, routers, segments, tables, time.process_time() - start


def costs(graph: nx.Graph, made: Imported) -> nx.Graph:
    """The graph as networkx has it from the library's own reader, with the cost of the cheapest of parallel edges."""
    simple = nx.Graph()
    simple.add_nodes_from(made.routers[node] for node in graph)
    for a, b, dist in graph.edges(data="dist"):
        a, b, cost = made.routers[a], made.routers[b], max(1, round(dist))
        if a != b and cost < simple.get_edge_data(a, b, {"cost": cost + 1})["cost"]:
            simple.add_edge(a, b, cost=cost)
    return simple


def walks(routes: dict[int, dict[int, Route]], router: int, segment: int) -> Iterator[list[int]]:
    """Every way that flows may take."""
    route = routes[router][segment]
    if not route.nexts:
        yield [router]
    for _, other in route.nexts:
        for rest in walks(routes, other, segment):
            yield [router, *rest]


@pytest.mark.parametrize("path", [*ZOO, *SNDLIB], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_real_topologies_route_as_networkx_does(path: Path, tmp_path: Path) -> None:
    made = imported(path)
    world, routers, segments, tables, _ = compiled(made, tmp_path)
    names = {id: name for name, id in routers.items()}
    simple = costs(nx.node_link_graph(topohub.get(f"{path.parent.name}/{path.stem}"), edges="edges"), made)
    routes = {router: {route.segment: route for route in found} for router, found in routes_of(world).items()}
    parts = [len(part) for part in nx.connected_components(simple)]
    assert len(tables["route"]) == sum(n * n for n in parts)
    rng = random.Random(path.stem)
    nodes = list(simple)
    for _ in range(40):
        a, b = rng.choice(nodes), rng.choice(nodes)
        if not nx.has_path(simple, a, b):
            assert segments[b] not in routes[routers[a]]
            continue
        ours = [[names[id] for id in way] for way in walks(routes, routers[a], segments[b])]
        theirs = list(nx.all_shortest_paths(simple, a, b, weight="cost"))
        assert {tuple(way) for way in ours} == {tuple(way) for way in theirs}
        assert routes[routers[a]][segments[b]].hops == max(map(len, theirs))
        for way in ours:
            assert sum(simple[x][y]["cost"] for x, y in pairwise(way)) == nx.shortest_path_length(simple, a, b, "cost")


def test_the_largest_real_topology_in_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = max(ZOO, key=lambda path: len(json.loads(path.read_bytes())["nodes"]))
    made = imported(path)
    world, _, _, tables, seconds = compiled(made, tmp_path)
    rows = sum(len(rows) for rows in tables.values())
    with capsys.disabled():
        print(f"\n{path.stem}: {len(world.routers)} routers, {len(world.links)} links, {rows} rows in {seconds:.2f} s")
    assert len(tables["route"]) == len(world.routers) ** 2
    graph = costs(nx.node_link_graph(topohub.get(f"{path.parent.name}/{path.stem}"), edges="edges"), made)
    start = time.process_time()
    for router in graph:
        nx.dijkstra_predecessor_and_distance(graph, router, weight="cost")
    paths = time.process_time() - start
    # It writes a row for each pair and all other tables, too: some ten times what finding the ways costs networkx.
    assert seconds < 20 * paths, (seconds, paths)


# ---- examples/abilene.yaml and examples/geant.yaml, with real packets

PORT, TTL = 7000, 64
DRAWN = "seattle", "atlanta"
IP_RECVTTL = 12  # <linux/in.h>
ROUNDS = (0.5, 1.0, 2.5, 6.0)  # seconds that each may last: what waits for ARP may have been lost in the one before


def nestnet(*arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if not key.startswith("NESTNET")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nestnet", *arguments]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=env, timeout=180, check=False, text=True)
    assert done.returncode == 0, (arguments, done.returncode, done.stdout, done.stderr)
    return done.stdout


def listener() -> socket.socket:
    """Inside a workload: sends, and receives datagrams with the TTL that they have then."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("0.0.0.0", PORT))
    opened.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    opened.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, TTL)
    opened.setblocking(False)
    return opened


def arriving(lab: str, addresses: dict[str, str], rows: dict[str, int]) -> dict[tuple[str, str], int]:
    """(from, to) -> the TTL with which a datagram arrives that each port sends to each other one."""
    found: dict[tuple[str, str], int] = {}
    want = set(permutations(addresses, 2))
    with ExitStack() as stack:
        sockets = {
            name: stack.enter_context(netns.run_in(netns.path(state.Lab(lab).workload(row)), listener))
            for name, row in rows.items()
        }
        poll = select.poll()
        at = {opened.fileno(): name for name, opened in sockets.items()}
        for descriptor in at:
            poll.register(descriptor, select.POLLIN)
        for seconds in ROUNDS:
            for a, b in want - found.keys():
                sockets[a].sendto(a.encode(), (addresses[b], PORT))
            end = time.monotonic() + seconds
            while want - found.keys() and (left := end - time.monotonic()) > 0:
                for descriptor, _ in poll.poll(left * 1000):
                    data, control, _, _ = sockets[at[descriptor]].recvmsg(64, 64)
                    found[data.decode(), at[descriptor]] = int.from_bytes(control[0][2][:4], sys.byteorder)
    return found


def ways(graph: nx.Graph) -> dict[tuple[str, str], set[int]]:
    """(from, to) -> the TTLs with which a packet may arrive: each router on a cheapest way takes one."""
    return {
        (a, b): {TTL - len(way) for way in nx.all_shortest_paths(graph, a, b, weight="cost")}
        for a, b in permutations(graph, 2)
    }


def traced(
    lab: str, graph: nx.Graph, addresses: dict[str, str], rows: dict[str, int], pairs: list[tuple[str, str]]
) -> dict[tuple[str, str], str]:
    """What traceroute says, where that is no cheapest way: the routers of each, then the port."""
    gateways = {
        node: str(next(ip_network(f"{address}/24", strict=False).hosts())) for node, address in addresses.items()
    }
    wrong = {}
    for a, b in pairs:
        command = ["ip", "netns", "exec", state.Lab(lab).workload(rows[a])]
        command += ["traceroute", "-n", "-I", "-q1", "-w3", addresses[b]]  # -I: all probes are one flow
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        hops = [line.split()[1] for line in shown.splitlines()[1:]]
        cheapest = nx.all_shortest_paths(graph, a, b, weight="cost")
        if hops not in [[*(gateways[node] for node in way), addresses[b]] for way in cheapest]:
            wrong[a, b] = shown
    return wrong


def told(lab: str, rows: dict[str, int], addresses: dict[str, str], a: str, b: str, *before: str, **how: Any) -> Run:
    """What traceroute and ping say, for docs/abilene.svg."""
    command = ["traceroute", "-n", "-I", "-q1", "-w3", addresses[b]]
    shown = netns.run_in(netns.path(state.Lab(lab).workload(rows[a])), partial(spoken, command))
    cities = {".".join(address.split(".")[:3]): city for city, address in addresses.items()}
    hops = [line.split()[1] for line in shown.splitlines()[1:]]
    answered = netns.run_in(
        netns.path(state.Lab(lab).workload(rows[b])), partial(spoken, ["ping", "-c1", addresses[a]])
    )
    ttl = re.search(r"ttl=(\d+)", answered)
    assert ttl, answered
    typed = f"nestnet exec abilene/{a}-1 -- traceroute -nI {addresses[b]}"
    return Run((*before, typed), tuple((hop, cities[".".join(hop.split(".")[:3])]) for hop in hops), int(ttl[1]), **how)


def spoken(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


PING = 0.02  # seconds between two


@contextmanager
def pinging(lab: str, row: int, address: str) -> Iterator[list[int]]:
    """Meanwhile a workload pings; in the end there is one number, of answers that did not come."""
    lost: list[int] = []
    command = ["ip", "netns", "exec", state.Lab(lab).workload(row), "ping", "-n", "-i", str(PING), "-w", "60", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ping:
        assert ping.stdout is not None
        for line in ping.stdout:
            if "ttl=" in line:
                break
        try:
            yield lost
        finally:
            ping.send_signal(signal.SIGINT)
            shown = ping.stdout.read()
    found = re.search(r"(\d+) packets transmitted, (\d+) received", shown)
    assert found, shown
    lost.append(int(found[1]) - int(found[2]))


@pytest.mark.root
@pytest.mark.parametrize(("example", "cut"), [("abilene", "kansas-city-indianapolis"), ("geant", "de-at")])
def test_packets_of_an_example_take_the_cheapest_ways(example: str, cut: str) -> None:
    """Every pair of nodes, both ways; then with a link less, and with it again."""
    lab = f"t-{uuid.uuid4().hex[:8]}"
    made = imported(EXAMPLES[example])
    data = json.loads(EXAMPLES[example].read_bytes())
    graph = costs(nx.node_link_graph(data, edges="edges"), made)
    network = next(iter(made.manifest.networks or ()))
    try:
        nestnet("up", f"examples/{example}.yaml", "--name", lab)
        assert json.loads(nestnet("test", "--lab", lab, "-o", "json"))["passed"]
        ports = json.loads(nestnet("get", "ports", "--lab", lab, "-o", "json"))["items"]
        addresses = {port["segment"]: port["addresses"][0].partition("/")[0] for port in ports}
        rows = {port["segment"]: port["row"] for port in ports}
        assert set(addresses) == set(graph)

        def agree(graph: nx.Graph) -> int:
            """How many packets were looked at."""
            expected, got = ways(graph), arriving(lab, addresses, rows)
            assert {pair: ttl for pair, ttl in got.items() if ttl not in expected[pair]} == {}
            assert expected.keys() == got.keys()
            return len(got)

        assert agree(graph) == len(graph) * (len(graph) - 1)
        pairs = random.Random(example).sample(sorted(permutations(graph, 2)), 110)
        assert traced(lab, graph, addresses, rows, pairs) == {}
        runs = [told(lab, rows, addresses, *DRAWN, colour="#0969da")] if example == "abilene" else []
        less = graph.copy()
        a, b = only(made.manifest).links[cut].between
        less.remove_edge(a, b)
        assert ways(less) != ways(graph)
        with pinging(lab, rows[a], addresses[b]) as lost:
            nestnet("link", "down", f"{network}/{cut}", "--lab", lab)
            agree(less)
            assert traced(lab, less, addresses, rows, [(a, b), (b, a), *pairs[:10]]) == {}
            if runs:
                typed = f"nestnet link down {network}/{cut}"
                runs.append(told(lab, rows, addresses, *DRAWN, typed, colour="#bc4c00", down=frozenset((a, b))))
            nestnet("link", "up", f"{network}/{cut}", "--lab", lab)
            agree(graph)
        assert lost[0] <= 1 / PING, "routes follow within a second"
        if runs:
            places = {made.routers[node["id"]]: node["pos"] for node in data["nodes"]}
            links = [(*link.between, link.cost) for link in only(made.manifest).links.values()]
            title = "Abilene: from Seattle to Atlanta, before and after Kansas City and Indianapolis lose each other"
            same(ROOT / "docs" / "abilene.svg", svg(title, places, links, runs), "scripts/draw")
    finally:
        nestnet("down", "--name", lab)
