"""The verbs for packets: exec, test, capture."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from nestnet.cli import files
from nestnet.cli import output as out
from nestnet.cli.find import Place, needs_lab, place, target
from nestnet.cli.formats import Format
from nestnet.model.errors import NestnetError


def exec(where: str, command: Sequence[str], lab: str | None) -> NoReturn:
    """Become the command, inside the namespace: stdin, signals and exit status are its own."""
    _become(place(target(lab), where), command)


def _become(inside: Place, command: Sequence[str]) -> NoReturn:
    from nestnet.agent import netns

    if shutil.which(command[0]) is None:
        raise NestnetError(f"there is no command {command[0]}", "no_command")
    sys.stdout.flush()
    netns.enter(inside.path)
    os.execvp(command[0], list(command))


def capture(where: str, filter: Sequence[str], write: str | None, count: int | None, lab: str | None) -> NoReturn:
    """Run tcpdump where the packets are; the equivalent command goes to stderr."""
    inside = place(target(lab), where, to_look=True)
    command = ["tcpdump", "-i", inside.interface, "-n"]
    if write is not None:
        # tcpdump would give up being root, and then often cannot write where root may.
        command += ["-Z", "root", "-U", "-w", write]
    else:
        command += ["-e", "-l"]
    if count is not None:
        command += ["-c", str(count)]
    command += filter
    print(f"ip netns exec {inside.namespace} {shlex.join(command)}", file=sys.stderr)
    _become(inside, command)


def test(file: str | None, lab: str | None, output: Format) -> bool:
    """Run the checks of a file, else of the lab's. True when all pass."""
    from nestnet.cli import checks

    found = target(lab)
    here = needs_lab(found)
    if file is None:
        if not here.file:
            raise NestnetError("the lab was made from stdin: say which file has the checks", "no_file")
        file = here.file
    document = files.read(file)
    wanted = files.manifest(document).checks or ()
    results = checks.run(found, here, wanted)
    failed = [result for result in results if not result.passed]
    if output in (Format.json, Format.yaml):
        items = [result.data() for result in results]
        out.data(out.versioned("CheckList", {"passed": not failed, "items": items}), output)
        return not failed
    if output is Format.name:
        for result in failed:
            print(f"{result.source} {result.target} {result.send}")
        return not failed
    out.table(
        ("", "FROM", "TO", "SEND", "EXPECT", "GOT", "MS"),
        (
            (
                "ok" if result.passed else "FAILED",
                result.source,
                result.target,
                result.send,
                result.expect,
                result.got,
                "-" if result.ms is None else f"{result.ms:g}",
            )
            for result in results
        ),
        {"ok": "green", "FAILED": "bold red"},
    )
    for result in failed:
        print(f"{result.source} -> {result.target} {result.send}: expected {result.expect}, got {result.got}")
        print(f"  {result.why}" if result.why else "")
    print(f"{len(results) - len(failed)} of {len(results)} checks passed")
    return not failed
