"""A graph as a network file: node-link JSON or GraphML in, a manifest out.

    node  ->  router NODE joined to segment NODE (a /24 of its own), with one port NODE-1
    edge  ->  link, of the cost round(dist), at least 1; 1 without dist

networkx reads the graph. What it would let pass (edges to nodes that are not there, nodes given twice) or
choke on (entities, depth, size) is refused before it sees the text, so each mistake is one `Refused`.

    read(text, source) -> Graph           bounded, judged, undirected
    network(graph, machines) -> Imported  names, addresses, costs, checks
    render(imported) -> str               the file, with a comment on top
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
import warnings
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from ipaddress import IPv4Network
from itertools import combinations, zip_longest
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NoReturn
from xml.parsers import expat

from nestnet.model.errors import Invalid, Problem
from nestnet.model.manifest import API_VERSION, COST, LINKS_PER_NETWORK, RESERVED, Manifest, parse
from nestnet.model.problems import join, quote
from nestnet.model.values import MAX_HOPS

from .reader import Position
from .writer import dump

if TYPE_CHECKING:
    import networkx as nx

MAX_BYTES = 50_000_000
MAX_NODES = 5_000
MAX_EDGES = 20_000
MAX_ELEMENTS = 1_000_000  # of GraphML, whatever they are
MAX_LEVELS = 32  # of elements in elements
ALL_PAIRS = 2_000  # checks; with more of them, each node is checked with the first only
MAX_MACHINES = 1_000
POOL = IPv4Network("10.0.0.0/8")  # each segment gets the next /24

LABEL = 63  # characters of a DNS label
NODE = LABEL - len("-1")  # so that the port's name fits
GRAPHML = "http://graphml.graphdrawing.org/xmlns"

CODES: dict[str, str] = {
    "json_syntax": "a file that begins with '{' or '[' is JSON (RFC 8259) in UTF-8, UTF-16 or UTF-32",
    "xml_syntax": "a file that begins with '<' is well-formed XML, at most 32 levels deep",
    "xml_feature": "GraphML declares no entities",
    "not_a_graph": "the file is one graph, as node-link JSON or GraphML, without nested graphs and hyperedges",
    "limit_exceeded": "there are at most 50,000,000 bytes, 5,000 nodes and 20,000 edges, "
    f"which become at most {LINKS_PER_NETWORK:,} links",
    "missing_key": "a node has an id, an edge a source and a target",
    "wrong_type": "an id is text or a whole number, `dist` a number",
    "duplicate_item": "an id is given to one node",
    "missing_node": "the source and the target of an edge are nodes",
    "out_of_range": f"`dist` makes a cost of at most {COST[1]}",
}


class Refused(Invalid):
    """A graph that cannot be imported, and where in the text that shows, if it is known."""

    def __init__(self, problem: Problem, source: str, position: Position | None = None) -> None:
        super().__init__([problem])
        self.source = source
        self.position = position

    def __str__(self) -> str:
        place = "".join(f":{number}" for number in self.position or ())
        return f"{quote(self.source)[1:-1]}{place}: {self.problems[0].code}: {self.problems[0].message}"


@dataclass(frozen=True)
class Graph:
    """What was read: `name` is what the graph calls itself, or empty; `graph` is undirected, may have parallel edges
    but no self loops, its nodes have `name`, its edges `cost`; `notes` says what was left out or put together."""

    name: str
    source: str
    graph: nx.MultiGraph
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """`routers` says which router (and segment) a node of the graph became, `comment` what else is worth knowing."""

    manifest: Manifest
    routers: Mapping[Hashable, str]
    comment: tuple[str, ...]
    notes: tuple[str, ...]


def read(text: bytes, source: str) -> Graph:
    """The graph in `text`; `source` is what messages call the file. Raises Refused."""
    return _Reading(source).read(text)


def render(imported: Imported) -> str:
    """The network file."""
    return "".join(f"# {line}\n" for line in imported.comment) + dump(imported.manifest)


# ---- reading


class _Reading:
    """One file: `source` is its name in messages."""

    def __init__(self, source: str) -> None:
        self.source = source

    def refuse(
        self, code: str, message: str, limit: int | None = None, pointer: str = "", at: Position | None = None
    ) -> NoReturn:
        raise Refused(Problem(code, pointer, message, limit=limit), self.source, at) from None

    def bound(self, count: int, limit: int, what: str, at: Position | None = None) -> None:
        if count > limit:
            self.refuse("limit_exceeded", f"there are more than {limit:,} {what}", limit, at=at)

    def read(self, text: bytes) -> Graph:
        self.bound(len(text), MAX_BYTES, "bytes")
        begin = text[:64].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xfe\xff \t\r\n")[:1]
        if begin == b"<":
            graph = self.graphml(text)
        elif begin in (b"{", b"["):
            graph = self.node_link(text)
        else:
            self.refuse("not_a_graph", "this is neither node-link JSON, which begins with '{', nor GraphML, with '<'")
        if not graph:
            self.refuse("not_a_graph", "the graph has no nodes")
        return self.undirected(graph)

    # -- node-link JSON

    def node_link(self, text: bytes) -> nx.Graph:
        import networkx as nx

        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            self.refuse("json_syntax", f"this is no JSON: {error.msg}", at=(error.lineno, error.colno))
        except UnicodeDecodeError as error:
            self.refuse("json_syntax", f"byte {error.start + 1} is no {error.encoding.upper()}")
        except RecursionError:
            self.refuse("json_syntax", "lists and mappings are nested too deep")
        except ValueError:  # Python bounds the digits of a number
            self.refuse("json_syntax", "a number has too many digits")
        if not isinstance(data, dict):
            self.refuse("not_a_graph", "this is JSON, but no mapping with nodes and edges")
        edges_key = "links" if "edges" not in data and "links" in data else "edges"
        nodes, edges = self.items(data, "nodes"), self.items(data, edges_key)
        self.bound(len(nodes), MAX_NODES, "nodes")
        self.bound(len(edges), MAX_EDGES, "edges")
        for flag in ("directed", "multigraph"):
            if not isinstance(data.get(flag, False), bool):
                self.refuse("wrong_type", f"{flag} is neither true nor false", pointer=join(flag))
        ids: set[Hashable] = set()
        for index, node in enumerate(nodes):
            id = self.id(node, "id", f"node {index + 1}", join("nodes", index))
            if id in ids:
                self.refuse(
                    "duplicate_item", f"the id {_shown(id)} is given to two nodes", pointer=join("nodes", index)
                )
            ids.add(id)
        for index, edge in enumerate(edges):
            for end in ("source", "target"):
                node = self.id(edge, end, f"edge {index + 1}", join(edges_key, index))
                if node not in ids:
                    message = f"the {end} of edge {index + 1}, {_shown(node)}, is no node{_other_type(node, ids)}"
                    self.refuse("missing_node", message, pointer=join(edges_key, index, end))
        about = data.get("graph")
        clean = {
            "directed": data.get("directed", False),
            "multigraph": data.get("multigraph", True),  # as networkx takes it
            "graph": {"name": about.get("name")} if isinstance(about, dict) else {},
            "nodes": [{key: node[key] for key in ("id", "name", "label") if key in node} for node in nodes],
            # Without `key`: each edge that is listed is one.
            "edges": [{key: edge[key] for key in ("source", "target", "dist") if key in edge} for edge in edges],
        }
        return nx.node_link_graph(clean, edges="edges")

    def items(self, data: Mapping[str, Any], key: str) -> list[Any]:
        if key not in data:
            self.refuse("not_a_graph", f"this is JSON, but has no list of {key}: node-link JSON has nodes and edges")
        found = data[key]
        if not isinstance(found, list):
            self.refuse("not_a_graph", f"{key} is no list", pointer=join(key))
        return found

    def id(self, item: object, key: str, what: str, pointer: str) -> Hashable:
        if not isinstance(item, dict):
            self.refuse("wrong_type", f"{what} is no mapping", pointer=pointer)
        if key not in item:
            self.refuse("missing_key", f"{what} has no {key}", pointer=pointer)
        id = item[key]
        if isinstance(id, bool) or not isinstance(id, str | int):
            self.refuse("wrong_type", f"the {key} of {what} is neither text nor a whole number", pointer=pointer)
        return id

    # -- GraphML

    def graphml(self, text: bytes) -> nx.Graph:
        import networkx as nx

        _Scan(self).run(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about ports of nodes, which mean nothing here
                return nx.read_graphml(BytesIO(text))
        except Exception as error:  # networkx lets through whatever a value or a part that it does not know leads to
            said = str(error.args[0]) if error.args else type(error).__name__
            self.refuse("not_a_graph", f"this GraphML cannot be read: {quote(said)[1:-1].rstrip('.:; ')}")

    # -- both

    def undirected(self, graph: nx.Graph) -> Graph:
        import networkx as nx

        notes: list[str] = []
        whole = nx.MultiGraph()
        for node, about in graph.nodes(data=True):
            whole.add_node(node, name=_text(about.get("name")) or _text(about.get("label")) or str(node))
        ways: dict[tuple[Hashable, Hashable], list[int]] = {}
        for number, (a, b, dist) in enumerate(graph.edges(data="dist"), 1):
            cost = self.cost(dist, number, f"{whole.nodes[a]['name']} - {whole.nodes[b]['name']}")
            if a == b:
                notes.append(f"left out: an edge from {quote(whole.nodes[a]['name'])} to itself")
            else:
                ways.setdefault((a, b), []).append(cost)
        merged = 0
        if not graph.is_directed():
            both = ways.items()
        else:
            together: dict[tuple[Hashable, Hashable], list[int]] = {}
            for (a, b), there in ways.items():
                if (b, a) in together:
                    continue
                back = ways.get((b, a), [])
                merged += min(len(there), len(back))
                # The nth edge there and the nth back are one link. Should they differ, the shorter one counts.
                together[a, b] = [min(c for c in pair if c is not None) for pair in zip_longest(there, back)]
            both = together.items()
            way_back = f": as the way back of another, {_count(merged, 'edge')} became no link" if merged else ""
            notes.append(f"the graph is directed, and links lead both ways{way_back}")
        for (a, b), costs in both:
            for cost in costs:
                whole.add_edge(a, b, cost=cost)
        links = whole.number_of_edges()
        if links > LINKS_PER_NETWORK:
            message = f"the graph becomes {links:,} links, and a network has at most {LINKS_PER_NETWORK:,}"
            self.refuse("limit_exceeded", message, LINKS_PER_NETWORK)
        return Graph(_text(graph.graph.get("name")), self.source, whole, tuple(notes))

    def cost(self, dist: object, number: int, edge: str) -> int:
        if dist is None:
            return 1
        if isinstance(dist, bool) or not isinstance(dist, int | float) or not _finite(dist):
            self.refuse("wrong_type", f"dist of edge {number}, {quote(edge)}, is no number")
        if dist > COST[1]:
            message = f"dist of edge {number}, {quote(edge)}, makes a cost of more than {COST[1]:,}: use a larger unit"
            self.refuse("out_of_range", message, COST[1])
        return max(COST[0], round(dist))


def _text(name: object) -> str:
    return str(name) if isinstance(name, str | int | float) else ""


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int of more than 1024 bits: too large, but a number
        return True


def _shown(id: Hashable) -> str:
    return quote(id) if isinstance(id, str) else _digits(id)


def _digits(id: Hashable) -> str:
    text = str(id)
    return text if len(text) <= 30 else f"{text[:30]}..."


def _other_type(node: Hashable, ids: set[Hashable]) -> str:
    if isinstance(node, int) and str(node) in ids:
        return f": the node's id is the text {quote(node)}"
    if isinstance(node, str) and re.fullmatch(r"-?[0-9]{1,30}", node) and int(node) in ids:
        return f": the node's id is the number {node}"
    return ""


class _Scan:
    """Reads GraphML once without keeping it: counts, bounds, and judges what networkx would let pass."""

    def __init__(self, reading: _Reading) -> None:
        self.reading = reading
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.EntityDeclHandler = self.entity
        self.depth = self.elements = self.edges = 0
        self.graphs: list[int] = []  # the depth of each
        self.nodes: set[str] = set()
        self.ends: list[tuple[str, str, Position]] = []

    @property
    def here(self) -> Position:
        return self.parser.CurrentLineNumber, self.parser.CurrentColumnNumber + 1

    def run(self, text: bytes) -> None:
        try:
            self.parser.Parse(text, True)
        except expat.ExpatError as error:
            at = (error.lineno, error.offset + 1)
            self.reading.refuse("xml_syntax", f"this is no XML: {expat.ErrorString(error.code)}", at=at)
        except (ValueError, LookupError):  # an encoding that expat does not know, and Python neither
            self.reading.refuse("xml_syntax", "the text is in an encoding that cannot be read: use UTF-8")
        if not self.graphs:
            self.reading.refuse("not_a_graph", "this is GraphML without a graph")
        for end, node, at in self.ends:
            if node not in self.nodes:
                self.reading.refuse("missing_node", f"the {end} of this edge, {quote(node)}, is no node", at=at)

    def entity(self, name: str, *_: object) -> None:
        message = f"the entity {quote(name)} is declared, and GraphML needs none: take it out"
        self.reading.refuse("xml_feature", message, at=self.here)

    def start(self, qualified: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        self.elements += 1
        refuse, here = self.reading.refuse, self.here
        if self.depth > MAX_LEVELS:
            refuse("xml_syntax", f"elements are nested more than {MAX_LEVELS} levels deep", MAX_LEVELS, at=here)
        self.reading.bound(self.elements, MAX_ELEMENTS, "elements", at=here)
        space, _, name = qualified.rpartition(" ")
        if self.depth == 1 and (name != "graphml" or space not in ("", GRAPHML)):
            refuse("not_a_graph", f"this is XML, but no GraphML: it begins with {quote(name)}", at=here)
        if space not in ("", GRAPHML):
            return
        if name == "graph":
            self.graphs.append(self.depth)
            if len(self.graphs) > 1:
                which = "a graph inside another" if self.depth > self.graphs[0] else "a second graph"
                refuse("not_a_graph", f"this is {which}: write one graph a file", at=here)
        elif name == "hyperedge":
            refuse("not_a_graph", "this is a hyperedge: a link joins two routers", at=here)
        elif name == "node":
            id = self.attribute(attributes, "id", "node")
            if id in self.nodes:
                refuse("duplicate_item", f"the id {quote(id)} is given to two nodes", at=here)
            self.nodes.add(id)
            self.reading.bound(len(self.nodes), MAX_NODES, "nodes", at=here)
        elif name == "edge":
            self.edges += 1
            self.reading.bound(self.edges, MAX_EDGES, "edges", at=here)
            self.ends += [(end, self.attribute(attributes, end, "edge"), here) for end in ("source", "target")]

    def end(self, _: str) -> None:
        self.depth -= 1

    def attribute(self, attributes: Mapping[str, str], key: str, what: str) -> str:
        if key not in attributes:
            self.reading.refuse("missing_key", f"this {what} has no {key}", at=self.here)
        return attributes[key]


# ---- names

# Letters that Unicode does not take apart into an ASCII letter and marks.
_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "ħ": "h", "ı": "i", "ł": "l", "ŋ": "ng", "þ": "th"}
)


def slug(text: str, limit: int = LABEL) -> str:
    """`text` as a DNS label of at most `limit` characters: São Paulo, SP is sao-paulo-sp. Empty if nothing is left."""
    plain = unicodedata.normalize("NFKD", text[:1000].lower().translate(_LETTERS))
    ascii = "".join(c for c in plain.lower() if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", ascii).strip("-")[:limit].rstrip("-")


class _Names:
    """Gives each thing a name of its own."""

    def __init__(self, limit: int = LABEL) -> None:
        self.limit = limit
        self.taken = set(RESERVED)
        self.last: dict[str, int] = {}

    def __call__(self, wanted: str) -> str:
        """`wanted`, with a number from 2 if somebody has that already."""
        name, number = wanted, self.last.get(wanted, 1)
        while name in self.taken:
            number += 1
            name = f"{wanted[: self.limit - len(str(number)) - 1].rstrip('-')}-{number}"
        self.taken.add(name)
        self.last[wanted] = number
        return name


# ---- writing


def network(graph: Graph, machines: int = 3) -> Imported:
    """The network file of a graph: its ports are spread over so many machines in turn."""
    nodes = graph.graph
    named = _Names(NODE)
    routers = {
        node: named(slug(name, NODE) or slug(str(node), NODE) or "node") for node, name in nodes.nodes(data="name")
    }
    name = _Names()(slug(graph.name) or slug(PurePath(graph.source).stem) or "topology")
    link = _Names()
    half = LABEL // 2
    links = {
        link(f"{routers[a][:half].rstrip('-')}-{routers[b][:half].rstrip('-')}"): {
            "between": [routers[a], routers[b]],
            "cost": cost,
        }
        for a, b, cost in nodes.edges(data="cost")
    }
    checks, said = _checks(nodes, name, routers)
    hosts = [f"m{number}" for number in range(1, machines + 1)]
    inside = {
        "segments": {
            router: {"cidr": str(prefix)}
            for router, prefix in zip(routers.values(), POOL.subnets(new_prefix=24), strict=False)
        },
        "routers": {router: {"segments": [router]} for router in routers.values()},
        "links": links,
        "ports": {
            f"{router}-1": {"segment": router, "host": hosts[index % machines]}
            for index, router in enumerate(routers.values())
        },
    }
    data = {"apiVersion": API_VERSION, "machines": {host: {} for host in hosts}, "networks": {name: inside}}
    source = quote(PurePath(graph.source).name)[1:-1]
    size = f"{_count(len(routers), 'node')} and {_count(len(links), 'edge')}"
    comment = (
        f"Made by `nestnet import topology` from the {size} of {source}:",
        "for each node a router, a segment and a port, for each edge a link.",
        *said,
    )
    return Imported(parse(data | {"checks": checks} if checks else data), routers, comment, graph.notes)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _checks(
    graph: nx.MultiGraph, network: str, routers: Mapping[Hashable, str]
) -> tuple[list[dict[str, str]], list[str]]:
    """One check for each pair of nodes, or with too many pairs one from each node to the first; and what to say."""
    import networkx as nx

    nodes = list(routers)
    pairs: Iterable[tuple[Hashable, Hashable]] = combinations(nodes, 2)
    said = []
    if len(nodes) * (len(nodes) - 1) // 2 > ALL_PAIRS:
        said.append(f"Checks between all pairs would be more than {ALL_PAIRS:,}: each node is checked with the first.")
        far = _routers_on_the_way(graph, nodes[0])
        near = [node for node in nodes[1:] if far.get(node, 0) <= MAX_HOPS]
        if left_out := len(nodes) - 1 - len(near):
            said.append(f"Without checks: {_count(left_out, 'node')} more than {MAX_HOPS} routers away from it.")
        pairs = ((node, nodes[0]) for node in near)
    part = {node: number for number, nodes in enumerate(nx.connected_components(graph)) for node in nodes}
    checks = [
        {
            "from": f"{network}/{routers[a]}-1",
            "to": f"{network}/{routers[b]}-1",
            "send": "icmp",
            "expect": "allow" if part[a] == part[b] else "deny",
        }
        for a, b in pairs
    ]
    return checks, said


def _routers_on_the_way(graph: nx.MultiGraph, to: Hashable) -> dict[Hashable, int]:
    """How many routers the longest of the cheapest ways from each node has, both ends among them."""
    import networkx as nx

    cost: dict[Hashable, int] = nx.single_source_dijkstra_path_length(graph, to, weight="cost")
    routers = {to: 1}
    for node, least in cost.items():  # nearest first
        for other, edges in graph[node].items():
            if cost[other] + min(edge["cost"] for edge in edges.values()) == least:
                routers[node] = max(routers.get(node, 0), 1 + routers[other])
    return routers
