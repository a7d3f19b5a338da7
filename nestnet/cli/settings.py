"""The files in /etc/nestnet: what the two processes are told by a service manager. An option of the command wins.

/etc/nestnet/controller.toml              /etc/nestnet/agent.toml

state = "/var/lib/nestnet"                controller = "https://192.0.2.10:7443"
listen = ["unix:/run/nestnet/...", ...]   machine = "m1"
group = "nestnet"                         state = "/var/lib/nestnet-agent"
names = ["ctl.example.net"]               pins = "/sys/fs/bpf/nestnet-agent"
certificate_hours = 720                   metrics = "http://127.0.0.1:9466"
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from nestnet.model.errors import Invalid, NotFound, Problem

FOLDER = Path("/etc/nestnet")
SOCKET = Path("/run/nestnet/controller.sock")


@dataclass(frozen=True)
class ControllerSettings:
    """Of `nestnet controller`: see api/server.py."""

    state: str = "/var/lib/nestnet"
    listen: tuple[str, ...] = (f"unix:{SOCKET}",)
    group: str | None = None
    names: tuple[str, ...] = ()
    certificate_hours: float = 720.0


@dataclass(frozen=True)
class AgentSettings:
    """Of `nestnet agent`: see agent/agent.py. `state` None: it shows no certificate."""

    controller: str = f"unix:{SOCKET}"
    machine: str = ""
    state: str | None = None
    pins: str = "/sys/fs/bpf/nestnet-agent"
    workloads: str | None = None
    metrics: str | None = None
    guests: str | None = None
    relay: str | None = None


Settings = TypeVar("Settings", ControllerSettings, AgentSettings)


def read(kind: type[Settings], file: Path | None, options: Mapping[str, Any]) -> Settings:
    """The settings of a file, and what options say instead (None: nothing). Without a file it is the one in /etc, if
    there is one. Raises NotFound for a file that was named, Invalid for what it should not say."""
    standard = FOLDER / ("controller.toml" if kind is ControllerSettings else "agent.toml")
    found = kind()
    if file is not None or standard.exists():
        found = _parse(kind, file or standard)
    return replace(found, **{name: value for name, value in options.items() if value not in (None, ())})


def write(settings: AgentSettings, file: Path) -> None:
    """Write down what is not as it is without."""
    standard = AgentSettings()
    lines = [
        f"{field.name} = {json.dumps(value)}\n"
        for field in fields(settings)
        if (value := getattr(settings, field.name)) != getattr(standard, field.name)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


def _parse(kind: type[Settings], file: Path) -> Settings:
    try:
        said = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise NotFound(f"file {file}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid([Problem("bad_value", str(file), f"this is no TOML: {error}")]) from None
    known = get_type_hints(kind)
    problems, values = [], {}
    for name, value in said.items():
        if name not in known:
            near = next(iter(get_close_matches(name, known, 1)), None)
            meant = f"; did you mean {near}?" if near else f"; there are {', '.join(known)}"
            problems.append(Problem("unknown_key", f"{file}: {name}", f"nobody reads {name}{meant}", nearest=near))
            continue
        wanted = str(known[name])
        if "tuple" in wanted:
            fits = isinstance(value, list) and all(isinstance(one, str) for one in value)
            value = tuple(value) if fits else value
        elif "float" in wanted:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        else:
            fits = isinstance(value, str)
        if not fits:
            words = "a list of texts" if "tuple" in wanted else "a number above 0" if "float" in wanted else "a text"
            problems.append(Problem("wrong_type", f"{file}: {name}", f"{name} is {words}"))
        values[name] = value
    if problems:
        raise Invalid(problems)
    return kind(**values)
