"""The verbs of operators: events, logs, backup, restore, confirm."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestnet.cli.changes import say
from nestnet.cli.find import Target, target
from nestnet.cli.formats import Format
from nestnet.model.errors import NestnetError, NotFound

TAIL = 1 << 20  # bytes of a log that are looked at for its last lines
PACE = 0.25  # seconds between two looks at logs that are followed


def events(follow: bool, last: int, lab: str | None, output: Format) -> None:
    """Print events, a line each."""
    with target(lab).client() as client:
        for line in client.events(last=last, follow=follow):
            if (event := line.get("event")) is None:
                continue
            if output in (Format.json, Format.yaml):
                _structured(event, output)
            else:
                print(_told(event, output is Format.wide), flush=True)


def _structured(event: Mapping[str, Any], output: Format) -> None:
    import json

    if output is Format.json:
        print(json.dumps(event, ensure_ascii=False), flush=True)
    else:
        import yaml

        print(yaml.safe_dump([dict(event)], sort_keys=False, allow_unicode=True), end="", flush=True)


def _told(event: Mapping[str, Any], wide: bool) -> str:
    """12:30:01 changed   uid:0  apply: 1 made: port acme/web9"""
    when = time.strftime("%Y-%m-%d %H:%M:%S" if wide else "%H:%M:%S", time.localtime(event["at"]))
    who = f"{event['who']}  " if event["who"] else ""
    machine = f"{event['machine']}: " if event["machine"] else ""
    where = "" if event["text"].startswith(machine) else machine  # the controller says of which machine it speaks
    lines = [f"{when}  {event['kind']:<9} {who}{where}{event['text']}"]
    if wide:
        lines += [f"  {change['op']} {change['kind']} {change['path']}" for change in event["changes"]]
    return "\n".join(lines)


def logs(of: str | None, follow: bool, last: int, lab: str | None) -> None:
    """Print the logs of a lab's processes. Raises NestnetError where there are none to be found."""
    found = target(lab)
    files = _files(found, of)
    for name, file in files.items():
        for text in _tail(file, last):
            print(f"{name}: {text}" if len(files) > 1 else text)
    sys.stdout.flush()
    if follow:
        _follow(files)


def _files(found: Target, of: str | None) -> dict[str, Path]:
    if found.lab is None:
        units = {None: "-u nestnet-controller -u nestnet-agent", "controller": "-u nestnet-controller"}
        hint = units.get(of, "-u nestnet-agent`, on that machine, `")
        raise NestnetError(f"the processes of {found.url} are no lab's: `journalctl {hint}` has their logs", "no_lab")
    names = {"controller": "controller", **{seat.name: f"agent-{seat.name}" for seat in found.lab.machines}}
    if of is not None and of not in names:
        raise NotFound(f"machine {of}")
    return {name: found.lab.logs / f"{file}.log" for name, file in names.items() if of in (None, name)}


def _tail(file: Path, count: int) -> list[str]:
    try:
        with file.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - TAIL))
            lines = log.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines[-count:] if count else []


def _follow(files: Mapping[str, Path]) -> None:
    at = {name: file.stat().st_size if file.exists() else 0 for name, file in files.items()}
    rest = dict.fromkeys(files, b"")
    while True:
        for name, file in files.items():
            for line in _new(file, name, at, rest):
                print(f"{name}: {line}" if len(files) > 1 else line, flush=True)
        select.select([], [], [], PACE)  # files have no doorbell


def _new(file: Path, name: str, at: dict[str, int], rest: dict[str, bytes]) -> Iterator[str]:
    try:
        with file.open("rb") as log:
            log.seek(at[name])
            data = log.read()
    except FileNotFoundError:
        return
    at[name] += len(data)
    *lines, rest[name] = (rest[name] + data).split(b"\n")
    for line in lines:
        yield line.decode(errors="replace")


def backup(file: Path, lab: str | None) -> None:
    """Write the store to a file."""
    if file.exists():
        raise NestnetError(f"{file} is there already: a backup never replaces a file", "exists")
    with target(lab).client() as client:
        revision = client.status()["revision"]
        size = client.backup(file)
    say(f"{file}: {size} bytes, revision {revision} or later; it has keys, so only you can read it")


def restore(file: Path, force: bool, lab: str | None) -> None:
    """Put the store back to a backup."""
    if not file.is_file():
        raise NotFound(f"file {file}")
    with target(lab).client() as client:
        revision = client.restore(file, force)
    say(f"restored, revision {revision}")
    if not force:
        say(
            "machines that would lose many ports hold that back: `nestnet status` names them, `nestnet confirm` lets go"
        )


def confirm(lab: str | None) -> None:
    """Let machines remove what a restored store does not know."""
    with target(lab).client() as client:
        revision = client.confirm()
    say(f"confirmed, revision {revision}")
