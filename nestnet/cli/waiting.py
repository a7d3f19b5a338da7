"""Waiting until machines have realised a change, with progress on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nestnet.model.errors import Conflict, NotRealised, Unreachable

if TYPE_CHECKING:
    from nestnet.api.client import Client
    from nestnet.lab.state import Lab

PACE = 0.05  # seconds between two questions


def until_realised(
    client: Client, told: Mapping[str, Any], machines: Collection[str], timeout: float, lab: Lab | None = None
) -> None:
    """Return when each of these machines has realised the change that was answered so.

    Raises NotRealised after `timeout` seconds, Unreachable as soon as the agent of one of them has ended in `lab`.
    """
    progress = Progress()
    limit = time.monotonic() + timeout
    what = "this change" if told["revision"] is None else f"revision {told['revision']}"
    try:
        while True:
            state = {m["name"]: m for m in client.status(told["token"])["machines"] if m["name"] in machines}
            # One on a host port that went is gone.
            behind = sorted(name for name, machine in state.items() if not machine["current"])
            progress.show(f"{what}: {len(machines) - len(behind)} of {len(machines)} machines", behind)
            if not behind:
                return
            if lab is not None and (ended := [name for name in behind if not lab.has_agent(name)]):
                raise Unreachable(f"the agent of {', '.join(ended)} has ended: its log is in {lab.logs}")
            if time.monotonic() > limit:
                raise NotRealised(_late(what, behind, state, timeout))
            time.sleep(PACE)  # the pace of asking; the wait is for the answer
    finally:
        progress.done()


def until_moved(client: Client, port: Mapping[str, Any], to: str, timeout: float) -> None:
    """Return when a port that moves lives on its new host, and nowhere else.

    Raises NotRealised after `timeout` seconds, and what went wrong when it stays where it was."""
    progress = Progress()
    limit = time.monotonic() + timeout
    path = port["path"]
    try:
        while True:
            now = client.get("port", port["id"])
            moving = now["moving"]
            if moving is None:
                if now["host"] != to:
                    raise Conflict(f"{path} is on {now['host']}: another change has ended the move", "move_ended")
                return
            if moving["phase"] == "failed":
                raise Conflict(moving["problem"], "move_failed")
            progress.show(f"{path}: {moving['phase']}")
            if time.monotonic() > limit:
                raise NotRealised(f"{path} is moving, phase {moving['phase']}, and has not arrived after {timeout:g} s")
            time.sleep(PACE)  # the pace of asking; the wait is for the answer
    finally:
        progress.done()


def _late(what: str, behind: list[str], state: Mapping[str, Mapping[str, Any]], timeout: float) -> str:
    lines = [f"{what} is stored, but {len(behind)} machines have not realised it after {timeout:g} s:"]
    for name in behind[:20]:
        machine = state.get(name, {})
        last = "" if machine.get("realised") is None else f"is at revision {machine['realised']}"
        lines.append(f"  {name} {'has never reported' if machine.get('reported') is None else last or 'is behind'}")
        lines += [f"    {plain_problem(problem)}" for problem in machine.get("problems") or ()]
    if len(behind) > 20:
        lines.append(f"  and {len(behind) - 20} more")
    return "\n".join(lines)


def plain_problem(problem: object) -> str:
    """A problem that an agent reported."""
    if isinstance(problem, Mapping):
        return str(problem.get("message") or problem.get("detail") or problem)
    return str(problem)


class Progress:
    """One line that changes on a terminal; elsewhere a line when something has changed, at most one a second."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = ""
        self._next = time.monotonic() + 1.0

    def show(self, text: str, behind: Sequence[str] = ()) -> None:
        if text == self._last:
            return
        if self._terminal:
            names = ", ".join(behind[:4]) + (", ..." if len(behind) > 4 else "")
            sys.stderr.write(f"\r\x1b[K{text}{', waiting for ' + names if names else ''}")
            sys.stderr.flush()
        elif time.monotonic() < self._next:
            return
        else:
            print(text, file=sys.stderr)
            self._next = time.monotonic() + 1.0
        self._last = text

    def done(self) -> None:
        if self._terminal and self._last:
            sys.stderr.write("\r\x1b[K")
