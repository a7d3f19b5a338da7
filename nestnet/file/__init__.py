"""The network file: text to model with positions, and back.

    document = load(text, "net.yaml")     YAML 1.2 -> Document(manifest, data, positions); raises Unreadable
    render(problems, document)            FILE:LINE:COL: code: message, one line each, in the order of the text
    dump(manifest)                        the manifest as text that `load` turns into the same manifest
    json_schema()                         what editors check with; published as schema/nestnet.v1.json

`reader.py` is the YAML, `document.py` puts reader, model and positions together.
"""

from .document import Document, Unreadable, load, render
from .reader import Positions
from .schema import json_schema
from .writer import dump

__all__ = ["Document", "Positions", "Unreadable", "dump", "json_schema", "load", "render"]
