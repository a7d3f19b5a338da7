"""Which way the arrows point: who may import whom, and why nobody else may.

Every import statement of every module under nestnet/ is read, wherever in the module it stands. To import less is
always allowed; a new arrow is a decision, written down here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
API_CLIENT = "nestnet.api.client"

# What the modules of a package may import from nestnet, besides their own package. A name covers what is below it.
ALLOWED: dict[str, set[str]] = {
    "model": set(),
    "file": {"nestnet.model"},
    "store": {"nestnet.model"},
    "compile": {"nestnet.model"},
    "datapath": {"nestnet.model", "nestnet.compile"},
    "agent": {"nestnet.model", "nestnet.compile", "nestnet.datapath", API_CLIENT},
    "api": {"nestnet.model", "nestnet.store", "nestnet.compile"},
    "lab": {"nestnet.model", "nestnet.file", "nestnet.agent.netns", "nestnet.agent.links", API_CLIENT},
    "cli": {"nestnet.model", "nestnet.file", "nestnet.lab", "nestnet.agent.netns", API_CLIENT},
    "bench": {
        "nestnet.model",
        "nestnet.compile",
        "nestnet.datapath",
        "nestnet.lab",
        "nestnet.agent.feed",
        "nestnet.agent.memory",
        "nestnet.agent.netns",
        API_CLIENT,
    },
}

# Why an arrow that is not in ALLOWED must not be: the first line that fits is the reason given.
REASONS: list[tuple[str, str, str]] = [
    ("model", "*", "the model is values and their meaning: it knows nobody, so that everybody can know it"),
    ("file", "*", "a file is text and positions around a model; what is done with it is the caller's"),
    ("compile", "datapath", "tables are the contract: the compiler does not know who runs them"),
    ("compile", "*", "compiling is a function from values to tables, without input, output or state"),
    ("store", "compile", "nothing compiled is stored"),
    ("store", "*", "the store holds desired state and wakes watchers; it knows no one who asks"),
    ("datapath", "*", "a datapath runs tables, whoever decided them and however they came"),
    ("agent", "api", "an agent reaches the controller over HTTP only: it may run on another machine"),
    ("agent", "store", "an agent reads only what its machine needs, from the feed"),
    ("agent", "*", "an agent gets values from the feed; files, labs and commands are for people"),
    ("api", "datapath", "the controller compiles only to explain; it touches no machine"),
    ("api", "agent", "the controller never calls an agent: agents ask"),
    ("api", "*", "the API is below those who use it"),
    (
        "lab",
        "agent",
        "a lab runs the real agent as a process of its own; of its code it uses namespaces and links only",
    ),
    ("lab", "*", "a lab makes machines and starts the real parts as processes; it has no part of them inside"),
    ("cli", "agent", "commands enter namespaces of this computer (exec, capture); all else an agent does is its own"),
    ("cli", "api", "commands reach the controller over HTTP only"),
    ("bench", "*", "what is measured is what people run: labs by their commands, and maps where no lab is so large"),
    ("cli", "bench", "the bench becomes a process of its own, which is on the CPU that it says"),
    ("cli", "*", "commands know what people type and the API, not how it is made so"),
]

# Modules held to something else than their package is, mostly to less.
NARROW: dict[str, tuple[set[str], str]] = {
    "nestnet.datapath.reference": (
        {"nestnet.model", "nestnet.datapath", "nestnet.compile.tables"},
        "the reference must find the compiler's faults, so it shares nothing with it but the tables",
    ),
    "nestnet.cli.doctors": (
        {"nestnet.model", "nestnet.cli", "nestnet.lab", "nestnet.agent.netns", "nestnet.agent.checkup", API_CLIENT},
        "it looks at this computer as an agent does, and changes nothing",
    ),
    "nestnet.cli.processes": (
        {
            "nestnet.agent.agent.run",
            "nestnet.agent.credentials",
            "nestnet.api.server.serve",
            "nestnet.cli.settings",
            "nestnet.model.errors",
        },
        "it becomes one of the two processes, or a machine, and is nothing else",
    ),
}

# Single imports that no one in a package may make, though the package below is allowed.
NEVER: list[tuple[str, str, str]] = [
    ("compile", "nestnet.model.meaning", "meaning and compiler meet only in tests: else a fault of one hides in both"),
    ("datapath", "nestnet.model.meaning", "meaning and datapaths meet only in tests"),
]


@dataclass(frozen=True)
class Import:
    """One name that one module imports: `name` is as long as the statement tells (`nestnet.api.client.Client`)."""

    module: str
    line: int
    name: str

    @property
    def package(self) -> str:
        return package_of(self.module)


def package_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / "nestnet").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """Every nestnet name that the source imports; relative imports are made absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if covers("nestnet", alias.name):
                    yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            if node.level:
                base = base[: len(base) - node.level + (1 if is_package else 0)]
            origin = ".".join([*(base if node.level else []), *([node.module] if node.module else [])])
            if covers("nestnet", origin):
                for alias in node.names:
                    yield Import(module, node.lineno, f"{origin}.{alias.name}")


def complaint(found: Import) -> str | None:
    """Why this import may not be, or None if it may."""
    target = package_of(found.name)
    if found.package in ("", "__main__") or target == "__version__":
        return None
    for package, name, why in NEVER:
        if found.package == package and covers(name, found.name):
            return why
    if found.module in NARROW:
        allowed, why = NARROW[found.module]
        return None if any(covers(name, found.name) for name in allowed) else why
    if target == found.package:
        return None
    if found.package not in ALLOWED:
        return "a new package: say in ALLOWED what it may import"
    if any(covers(name, found.name) for name in ALLOWED[found.package]):
        return None
    return next((why for package, to, why in REASONS if package == found.package and to in (target, "*")), "no arrow")


def test_arrows() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line}: {found.module} imports {found.name}: {why}"
        for module, path in modules()
        for found in imports(module, path.read_text(), path.name == "__init__.py")
        if (why := complaint(found))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_package_is_in_the_table() -> None:
    packages = {path.name for path in (ROOT / "nestnet").iterdir() if any(path.glob("*.py"))}
    assert packages <= set(ALLOWED), f"not in ALLOWED: {sorted(packages - set(ALLOWED))}"


def test_no_arrow_points_in_a_circle() -> None:
    below: dict[str, set[str]] = {}
    for package in sorted(ALLOWED, key=lambda p: len(ALLOWED[p])):
        # The client is a leaf of its own: it is in the api's folder but imports no more than the model.
        direct = {package_of(name) for name in ALLOWED[package] if name != API_CLIENT}
        below[package] = direct.union(*(below.get(name, set()) for name in direct))
        assert package not in below[package]


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("nestnet.compile.compiler", "from nestnet.model.values import Port", True),
        ("nestnet.compile.compiler", "from nestnet.model import meaning", False),
        ("nestnet.compile.compiler", "from ..model.meaning import deliver", False),
        ("nestnet.compile.compiler", "from . import tables", True),
        ("nestnet.model.values", "def f():\n    import nestnet.compile.tables", False),
        ("nestnet.datapath.reference", "from nestnet.compile.tables import FLOW", True),
        ("nestnet.datapath.reference", "from nestnet.compile import compiler", False),
        ("nestnet.datapath.kernel", "from nestnet.compile import diff", True),
        ("nestnet.agent.main", "from nestnet.api.client import Client", True),
        ("nestnet.agent.main", "from nestnet.api import client", True),
        ("nestnet.agent.main", "from nestnet.api import app", False),
        ("nestnet.cli.get", "from nestnet.store import Store", False),
        ("nestnet.cli.get", "from nestnet.agent.agent import Agent", False),
        ("nestnet.cli.processes", "from nestnet.agent.agent import run", True),
        ("nestnet.lab.up", "from nestnet.agent import netns", True),
        ("nestnet.lab.up", "from nestnet.agent.feed import Feed", False),
        ("nestnet.cli.get", "from nestnet import __version__", True),
        ("nestnet.store.rows", "from nestnet.compile import tables", False),
        ("nestnet.novel.part", "from nestnet.model import values", False),
    ],
)
def test_the_test_sees(module: str, source: str, allowed: bool) -> None:
    assert all(complaint(found) is None for found in imports(module, source)) is allowed


def test_every_reason_is_one_sentence_about_a_package_that_exists() -> None:
    assert {package for package, _, _ in REASONS} <= set(ALLOWED)
    assert {to for _, to, _ in REASONS} <= set(ALLOWED) | {"*"}
    assert set(ALLOWED) <= {package for package, to, _ in REASONS if to == "*"}
