"""A graph as a network file: node-link JSON or GraphML in, a manifest out.

    node  ->  router NODE joined to segment NODE (a /24 of its own), with one port NODE-1
    edge  ->  link, of the cost round(dist), at least 1; 1 without dist

The first mistake ends the reading, as one `Refused`: an edge to a node that is not there, a node given twice, entities,
depth, size, and what would be no network that can be realised.

    read(text, source) -> Graph           bounded, judged, undirected
    network(graph, machines) -> Imported  names, addresses, costs, checks
    render(imported) -> str               the file, with a comment on top
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from ipaddress import IPv4Network
from itertools import combinations, zip_longest
from pathlib import PurePath
from typing import Any, NoReturn
from xml.parsers import expat

from nestnet.model.errors import Invalid, Problem
from nestnet.model.manifest import (
    API_VERSION,
    COST,
    LINKS_PER_NETWORK,
    RESERVED,
    ROUTERS_PER_NETWORK,
    ROUTES_PER_NETWORK,
    Manifest,
    parse,
)
from nestnet.model.problems import join, quote
from nestnet.model.values import MAX_HOPS

from .reader import Position
from .writer import dump

MAX_BYTES = 50_000_000
MAX_NODES = ROUTERS_PER_NETWORK
MAX_EDGES = 20_000
MAX_ELEMENTS = 1_000_000  # of GraphML, whatever they are
MAX_LEVELS = 32  # of elements in elements
ALL_PAIRS = 256 * 255 // 2  # checks: more nodes are never connected; with more, each is checked with the first only
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
    "limit_exceeded": f"there are at most {MAX_BYTES:,} bytes, {MAX_NODES:,} nodes and {MAX_EDGES:,} edges, "
    f"which become at most {LINKS_PER_NETWORK:,} links and {ROUTES_PER_NETWORK:,} routes (256 connected nodes)",
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


Node = str | int
"""The id of a node. 1 and "1" are two."""


@dataclass(frozen=True)
class Graph:
    """What was read: `name` is what the graph calls itself, or empty; `nodes` have names; `edges` have a cost and
    no direction, and are never from a node to itself; `notes` says what was left out or put
    together."""

    name: str
    source: str
    nodes: Mapping[Node, str]
    edges: tuple[tuple[Node, Node, int], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """`routers` says which router (and segment) a node of the graph became, `comment` what else is worth knowing."""

    manifest: Manifest
    routers: Mapping[Node, str]
    comment: tuple[str, ...]
    notes: tuple[str, ...]


def read(text: bytes, source: str) -> Graph:
    """The graph in `text`; `source` is what messages call the file. Raises Refused."""
    return _Reading(source).read(text)


def render(imported: Imported) -> str:
    """The network file."""
    return "".join(f"# {line}\n" for line in imported.comment) + dump(imported.manifest)


# ---- reading


@dataclass
class _Raw:
    """A graph as its text has it: nodes with what they are called, edges with what `dist` says, None if nothing."""

    name: str = ""
    directed: bool = False
    parallel: bool = True  # two edges between the same nodes are two
    nodes: dict[Node, str] = field(default_factory=dict)
    edges: list[tuple[Node, Node, object]] = field(default_factory=list)


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
            raw = _GraphML(self).run(text)
        elif begin in (b"{", b"["):
            raw = self.node_link(text)
        else:
            self.refuse("not_a_graph", "this is neither node-link JSON, which begins with '{', nor GraphML, with '<'")
        if not raw.nodes:
            self.refuse("not_a_graph", "the graph has no nodes")
        return self.undirected(raw)

    # -- node-link JSON

    def node_link(self, text: bytes) -> _Raw:
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
        about = data.get("graph")
        raw = _Raw(
            name=_text(about.get("name")) if isinstance(about, dict) else "",
            directed=data.get("directed", False),
            parallel=data.get("multigraph", True),  # as networkx takes it
        )
        for index, node in enumerate(nodes):
            id = self.id(node, "id", f"node {index + 1}", join("nodes", index))
            if id in raw.nodes:
                self.refuse(
                    "duplicate_item", f"the id {_shown(id)} is given to two nodes", pointer=join("nodes", index)
                )
            raw.nodes[id] = _text(node.get("name")) or _text(node.get("label")) or str(id)
        for index, edge in enumerate(edges):
            ends = []
            for end in ("source", "target"):
                node = self.id(edge, end, f"edge {index + 1}", join(edges_key, index))
                if node not in raw.nodes:
                    message = f"the {end} of edge {index + 1}, {_shown(node)}, is no node{_other_type(node, raw.nodes)}"
                    self.refuse("missing_node", message, pointer=join(edges_key, index, end))
                ends.append(node)
            raw.edges.append((ends[0], ends[1], edge.get("dist")))
        return raw

    def items(self, data: Mapping[str, Any], key: str) -> list[Any]:
        if key not in data:
            self.refuse("not_a_graph", f"this is JSON, but has no list of {key}: node-link JSON has nodes and edges")
        found = data[key]
        if not isinstance(found, list):
            self.refuse("not_a_graph", f"{key} is no list", pointer=join(key))
        return found

    def id(self, item: object, key: str, what: str, pointer: str) -> Node:
        if not isinstance(item, dict):
            self.refuse("wrong_type", f"{what} is no mapping", pointer=pointer)
        if key not in item:
            self.refuse("missing_key", f"{what} has no {key}", pointer=pointer)
        id = item[key]
        if isinstance(id, bool) or not isinstance(id, str | int):
            self.refuse("wrong_type", f"the {key} of {what} is neither text nor a whole number", pointer=pointer)
        return id

    # -- both

    def undirected(self, raw: _Raw) -> Graph:
        notes: list[str] = []
        ways: dict[tuple[Node, Node], list[int]] = {}
        again = 0
        for number, (a, b, dist) in enumerate(raw.edges, 1):
            cost = self.cost(dist, number, f"{raw.nodes[a]} - {raw.nodes[b]}")
            if a == b:
                notes.append(f"left out: an edge from {quote(raw.nodes[a])} to itself")
                continue
            pair = (b, a) if not raw.directed and (b, a) in ways else (a, b)
            costs = ways.setdefault(pair, [])
            if costs and not raw.parallel:
                costs[0] = min(costs[0], cost)
                again += 1
            else:
                costs.append(cost)
        if again:
            notes.append(f"the graph has no parallel edges: {_count(again, 'edge')} given before became no link")
        edges: list[tuple[Node, Node, int]] = []
        merged = 0
        done: set[tuple[Node, Node]] = set()  # as the way back of another
        for (a, b), there in ways.items():
            if (a, b) in done:
                continue
            costs = there
            if raw.directed and (b, a) in ways:
                done.add((b, a))
                back = ways[b, a]
                merged += min(len(there), len(back))
                # The nth edge there and the nth back are one link. Should they differ, the shorter one counts.
                costs = [min(c for c in pair if c is not None) for pair in zip_longest(there, back)]
            edges += [(a, b, cost) for cost in costs]
        if raw.directed:
            way_back = f": as the way back of another, {_count(merged, 'edge')} became no link" if merged else ""
            notes.append(f"the graph is directed, and links lead both ways{way_back}")
        if len(edges) > LINKS_PER_NETWORK:
            message = f"the graph becomes {len(edges):,} links, and a network has at most {LINKS_PER_NETWORK:,}"
            self.refuse("limit_exceeded", message, LINKS_PER_NETWORK)
        routes = sum(len(part) ** 2 for part in _parts(raw.nodes, edges))
        if routes > ROUTES_PER_NETWORK:
            message = f"the graph becomes {routes:,} routes, one to each node that a node reaches, and a network has "
            self.refuse("limit_exceeded", f"{message}at most {ROUTES_PER_NETWORK:,}", ROUTES_PER_NETWORK)
        return Graph(raw.name, self.source, raw.nodes, tuple(edges), tuple(notes))

    def cost(self, dist: object, number: int, edge: str) -> int:
        if dist is None:
            return 1
        if isinstance(dist, bool) or not isinstance(dist, int | float) or not _finite(dist):
            self.refuse("wrong_type", f"dist of edge {number}, {quote(edge)}, is no number")
        if (cost := round(dist)) > COST[1]:
            message = f"dist of edge {number}, {quote(edge)}, makes a cost of more than {COST[1]:,}: use a larger unit"
            self.refuse("out_of_range", message, COST[1])
        return max(COST[0], cost)


def _parts(nodes: Iterable[Node], edges: Iterable[tuple[Node, Node, int]]) -> list[list[Node]]:
    """The nodes in groups: those that edges connect are one; in the order of the text."""
    beyond: dict[Node, list[Node]] = defaultdict(list)
    for a, b, _ in edges:
        beyond[a].append(b)
        beyond[b].append(a)
    seen: set[Node] = set()
    parts = []
    for node in nodes:
        if node not in seen:
            part = [node]
            seen.add(node)
            for here in part:
                new = dict.fromkeys(there for there in beyond[here] if there not in seen)
                seen.update(new)
                part += new
            parts.append(part)
    return parts


def _text(name: object) -> str:
    return str(name) if isinstance(name, str | int | float) else ""


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int of more than 1024 bits: too large, but a number
        return True


def _shown(id: Node) -> str:
    return quote(id) if isinstance(id, str) else _digits(id)


def _digits(id: Node) -> str:
    text = str(id)
    return text if len(text) <= 30 else f"{text[:30]}..."


def _other_type(node: Node, ids: Mapping[Node, str]) -> str:
    if isinstance(node, int) and str(node) in ids:
        return f": the node's id is the text {quote(node)}"
    if isinstance(node, str) and re.fullmatch(r"-?[0-9]{1,30}", node) and int(node) in ids:
        return f": the node's id is the number {node}"
    return ""


# -- GraphML

NUMBERS = ("int", "long", "float", "double")
# What is read of each, the first that is there. The Internet Topology Zoo calls a graph's name Network.
ABOUT = {"graph": ("name", "Network"), "node": ("name", "label"), "edge": ("dist",)}


@dataclass
class _Key:
    """What `<key>` declares: the name and type of a value, of which elements, and what it is if it is not given."""

    of: str
    name: str
    type: str
    default: str | None = None


class _GraphML:
    """Reads GraphML with expat, an element at a time, and keeps only what becomes of it.

    <key id="k" for="edge" attr.name="dist" attr.type="double"/>
    <graph edgedefault="undirected">
      <node id="a"><data key="n">Berlin</data></node>
      <edge source="a" target="b"><data key="k">12.5</data></edge>
    """

    def __init__(self, reading: _Reading) -> None:
        self.reading = reading
        self.parser = expat.ParserCreate(namespace_separator=" ")
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.characters
        self.parser.EntityDeclHandler = self.entity
        self.elements = 0
        self.path: list[str] = []  # names of the elements around the place, "" for foreign ones
        self.graphs: list[int] = []  # the depth of each
        self.keys: dict[str, _Key] = {}
        self.key: _Key | None = None  # the one being declared
        self.directed: set[bool] = set()
        # What the element being read says: key -> text, and where.
        self.graph: dict[str, tuple[str, Position]] = {}
        self.item: dict[str, tuple[str, Position]] = {}
        self.data: tuple[str, Position] | None = None
        self.text: list[str] | None = None
        self.nodes: dict[str, dict[str, tuple[str, Position]]] = {}
        self.edges: list[tuple[str, str, dict[str, tuple[str, Position]], Position]] = []

    @property
    def here(self) -> Position:
        return self.parser.CurrentLineNumber, self.parser.CurrentColumnNumber + 1

    def run(self, text: bytes) -> _Raw:
        try:
            self.parser.Parse(text, True)
        except expat.ExpatError as error:
            at = (error.lineno, error.offset + 1)
            self.reading.refuse("xml_syntax", f"this is no XML: {expat.ErrorString(error.code)}", at=at)
        except (ValueError, LookupError):  # an encoding that expat does not know, and Python neither
            self.reading.refuse("xml_syntax", "the text is in an encoding that cannot be read: use UTF-8")
        if not self.graphs:
            self.reading.refuse("not_a_graph", "this is GraphML without a graph")
        if len(self.directed) > 1:
            self.reading.refuse("not_a_graph", "some edges are directed and some are not: write one kind")
        for said in (self.graph, *self.nodes.values(), *(edge[2] for edge in self.edges)):
            for id, (_, at) in said.items():
                if id and id not in self.keys:
                    self.reading.refuse("missing_key", f"no key {quote(id)} is declared for this data", at=at)
        raw = _Raw(name=self.named("graph", self.graph), directed=True in self.directed)
        for id, said in self.nodes.items():
            drawn = said[""][0].strip() if "" in said else ""
            raw.nodes[id] = self.named("node", said) or drawn or id
        for source, target, said, at in self.edges:
            for end, node in (("source", source), ("target", target)):
                if node not in raw.nodes:
                    self.reading.refuse("missing_node", f"the {end} of this edge, {quote(node)}, is no node", at=at)
            raw.edges.append((source, target, self.value("edge", "dist", said)))
        return raw

    def named(self, of: str, said: Mapping[str, tuple[str, Position]]) -> str:
        return next(filter(None, (_text(self.value(of, name, said)) for name in ABOUT[of])), "")

    def value(self, of: str, name: str, said: Mapping[str, tuple[str, Position]]) -> object:
        """What an element says under this name, of the type that is declared; None if nothing."""
        for id, key in self.keys.items():
            if key.name == name and key.of in (of, "all") and (id in said or key.default is not None):
                text, at = said.get(id, (key.default or "", None))
                if key.type not in NUMBERS:
                    return text.strip()
                try:
                    return int(text) if key.type in ("int", "long") else float(text)
                except ValueError:
                    message = f"{name} of this {of}, {quote(text.strip())}, is no number of type {key.type}"
                    self.reading.refuse("wrong_type", message, at=at)
        return None

    def entity(self, name: str, *_: object) -> None:
        message = f"the entity {quote(name)} is declared, and GraphML needs none: take it out"
        self.reading.refuse("xml_feature", message, at=self.here)

    def start(self, qualified: str, attributes: dict[str, str]) -> None:
        self.elements += 1
        refuse, here = self.reading.refuse, self.here
        if len(self.path) >= MAX_LEVELS:
            refuse("xml_syntax", f"elements are nested more than {MAX_LEVELS} levels deep", MAX_LEVELS, at=here)
        self.reading.bound(self.elements, MAX_ELEMENTS, "elements", at=here)
        space, _, name = qualified.rpartition(" ")
        ours = space in ("", GRAPHML)
        if not self.path and (name != "graphml" or not ours):
            refuse("not_a_graph", f"this is XML, but no GraphML: it begins with {quote(name)}", at=here)
        inside = self.path[-1] if self.path else ""
        self.path.append(name if ours else "")
        if not ours:
            # yEd draws a node's name, and has no key for it.
            if name == "NodeLabel" and "node" in self.path and "" not in self.item:
                self.item[""] = ("", here)
                self.text = []
            return
        if name == "graph":
            self.graphs.append(len(self.path))
            if len(self.graphs) > 1:
                which = "a graph inside another" if len(self.path) > self.graphs[0] else "a second graph"
                refuse("not_a_graph", f"this is {which}: write one graph a file", at=here)
            self.directed_by_default = attributes.get("edgedefault") == "directed"
        elif name == "hyperedge":
            refuse("not_a_graph", "this is a hyperedge: a link joins two routers", at=here)
        elif name == "key":
            self.key = _Key(
                attributes.get("for", "all"), attributes.get("attr.name", ""), attributes.get("attr.type", "string")
            )
            self.keys[self.attribute(attributes, "id", "key")] = self.key
        elif name == "default" and inside == "key":
            self.text = []
        elif name == "data" and inside in ABOUT:
            self.data = self.attribute(attributes, "key", "data"), here
            self.text = []
        elif name == "node" and inside == "graph":
            id = self.attribute(attributes, "id", "node")
            if id in self.nodes:
                refuse("duplicate_item", f"the id {quote(id)} is given to two nodes", at=here)
            self.item = self.nodes[id] = {}
            self.reading.bound(len(self.nodes), MAX_NODES, "nodes", at=here)
        elif name == "edge" and inside == "graph":
            self.item = {}
            ends = [self.attribute(attributes, end, "edge") for end in ("source", "target")]
            self.edges.append((ends[0], ends[1], self.item, here))
            self.reading.bound(len(self.edges), MAX_EDGES, "edges", at=here)
            said = attributes.get("directed")
            self.directed.add(said == "true" if said is not None else self.directed_by_default)

    def characters(self, text: str) -> None:
        if self.text is not None:
            self.text.append(text)

    def end(self, qualified: str) -> None:
        name = self.path.pop()
        if self.text is None:
            return
        text = "".join(self.text)
        if name == "default" and self.key is not None:
            self.key.default = text
        elif name == "data" and self.data is not None:
            key, at = self.data
            (self.graph if self.path[-1] == "graph" else self.item)[key] = (text, at)
        elif name == "" and qualified.endswith(" NodeLabel"):
            self.item[""] = (text, self.item[""][1])
        else:
            return
        self.text = None

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
    named = _Names(NODE)
    routers = {node: named(slug(name, NODE) or slug(str(node), NODE) or "node") for node, name in graph.nodes.items()}
    name = _Names()(slug(graph.name) or slug(PurePath(graph.source).stem) or "topology")
    link = _Names()
    half = LABEL // 2
    links = {
        link(f"{routers[a][:half].rstrip('-')}-{routers[b][:half].rstrip('-')}"): {
            "between": [routers[a], routers[b]],
            "cost": cost,
        }
        for a, b, cost in graph.edges
    }
    checks, said = _checks(graph, name, routers)
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


def _checks(graph: Graph, network: str, routers: Mapping[Node, str]) -> tuple[list[dict[str, str]], list[str]]:
    """One check for each pair of nodes, or with too many pairs one from each node to the first; and what to say. Not of
    pairs so far from each other that a TTL of 64 does not last."""
    nodes = list(routers)
    pairs: Iterable[tuple[Node, Node]] = combinations(nodes, 2)
    said = []
    if len(nodes) * (len(nodes) - 1) // 2 > ALL_PAIRS:
        said.append(f"Checks between all pairs would be more than {ALL_PAIRS:,}: each node is checked with the first.")
        pairs = ((node, nodes[0]) for node in nodes[1:])
    joins: dict[Node, dict[Node, int]] = {node: {} for node in nodes}
    for a, b, cost in graph.edges:
        for here, there in ((a, b), (b, a)):
            joins[here][there] = min(cost, joins[here].get(there, cost))
    part = {node: number for number, nodes in enumerate(_parts(nodes, graph.edges)) for node in nodes}
    routers_to: dict[Node, dict[Node, int]] = {}
    checks = []
    left_out = 0
    for a, b in pairs:
        if part[a] == part[b] and len(nodes) > MAX_HOPS:
            if b not in routers_to:
                routers_to[b] = _routers_on_the_way(joins, b)
            if routers_to[b][a] > MAX_HOPS:
                left_out += 1
                continue
        checks.append(
            {
                "from": f"{network}/{routers[a]}-1",
                "to": f"{network}/{routers[b]}-1",
                "send": "icmp",
                "expect": "allow" if part[a] == part[b] else "deny",
            }
        )
    if left_out:
        said.append(f"Without checks: {_count(left_out, 'pair')} with more than {MAX_HOPS} routers on the way.")
    return checks, said


def _routers_on_the_way(joins: Mapping[Node, Mapping[Node, int]], to: Node) -> dict[Node, int]:
    """How many routers the longest of the cheapest ways from each node has, both ends among them."""
    costs: dict[Node, int] = {to: 0}
    routers: dict[Node, int] = {}
    heap: list[tuple[int, int, Node]] = [(0, 0, to)]
    pushed = 0  # ids of both types cannot be compared
    while heap:  # nearest first
        cost, _, node = heappop(heap)
        if node in routers:
            continue
        before = [
            routers[other] for other, more in joins[node].items() if other in routers and costs[other] + more == cost
        ]
        routers[node] = 1 + max(before, default=0)
        for other, more in joins[node].items():
            if other not in costs or cost + more < costs[other]:
                costs[other] = cost + more
                pushed += 1
                heappush(heap, (costs[other], pushed, other))
    return routers
