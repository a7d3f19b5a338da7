"""Metrics as text, in the format that Prometheus reads (version 0.0.4).

A function from values to text: whoever has the values calls it when somebody asks. Series are bounded by the caller,
and what a label may hold is said next to each family in docs/operations.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: `kind` is counter or gauge, `samples` are (labels, value)."""

    name: str
    kind: str
    help: str
    samples: Iterable[tuple[Labels, float]] = field(default=())


def one(name: str, kind: str, help: str, value: float) -> Family:
    """A metric without labels."""
    return Family(name, kind, help, (({}, value),))


def text(families: Iterable[Family]) -> str:
    """All of it, families in this order; one without samples is left out."""
    lines: list[str] = []
    for family in families:
        samples = [f"{family.name}{_labels(labels)} {_number(value)}" for labels, value in family.samples]
        if samples:
            help = family.help.replace("\\", "\\\\").replace("\n", "\\n")
            lines += [f"# HELP {family.name} {help}", f"# TYPE {family.name} {family.kind}", *samples]
    return "".join(f"{line}\n" for line in lines)


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
