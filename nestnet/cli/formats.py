"""The words of -o. A module of its own, because the command line needs them before anything is shown."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    table = "table"
    wide = "wide"
    json = "json"
    yaml = "yaml"
    name = "name"
