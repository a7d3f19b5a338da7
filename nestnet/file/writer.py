"""A manifest as text: the short form that people write, which `load` turns into the same manifest."""

from __future__ import annotations

import math
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from nestnet.model.manifest import Manifest, to_data

from .reader import scalar

ONE_LINE = 80  # characters of an object without the spaces before it


class _Writer(yaml.CSafeDumper):
    """Quotes what YAML 1.1 or YAML 1.2 would not read as text, so that any reader may read it."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> MappingNode:
        """What has no mappings in it is one object, and stands on one line if that is not too long."""
        node = super().represent_mapping(tag, mapping, flow_style)
        if not node.flow_style and sum(map(_width, node.value)) < ONE_LINE:
            node.flow_style = True
        return node


def _width(pair: tuple[Node, Node]) -> float:
    """The characters of a key and its value: infinitely many if it does not belong on one line."""
    key, value = pair
    items = value.value if isinstance(value, SequenceNode) else [value]
    return (
        math.inf
        if not all(isinstance(item, ScalarNode) for item in items)
        else sum(len(item.value) + 2 for item in (key, *items))
    )


def _text(writer: yaml.CSafeDumper, text: str) -> ScalarNode:
    style = "'" if not isinstance(scalar(text), str) else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style)


_Writer.add_representer(str, _text)


def dump(manifest: Manifest) -> str:
    """YAML that means the same in every version of it. Ends with a newline."""
    return yaml.dump(
        to_data(manifest), Dumper=_Writer, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120
    )
