"""A manifest as text: the short form that people write, which `load` turns into the same manifest."""

from __future__ import annotations

from typing import Any

import yaml
from yaml.nodes import ScalarNode

from nestnet.model.manifest import Manifest, to_data

from .reader import scalar


class _Writer(yaml.CSafeDumper):
    """Quotes what YAML 1.1 or YAML 1.2 would not read as text, so that any reader may read it."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(writer: yaml.CSafeDumper, text: str) -> ScalarNode:
    style = "'" if not isinstance(scalar(text), str) else None
    return writer.represent_scalar("tag:yaml.org,2002:str", text, style)


_Writer.add_representer(str, _text)


def dump(manifest: Manifest) -> str:
    """YAML that means the same in every version of it. Ends with a newline."""
    return yaml.dump(
        to_data(manifest), Dumper=_Writer, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120
    )
