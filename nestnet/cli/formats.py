"""The words of -o, and of `link`. A module of its own: the command line needs them before anything is shown."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    table = "table"
    wide = "wide"
    json = "json"
    yaml = "yaml"
    name = "name"


class State(StrEnum):
    up = "up"
    down = "down"
