"""The two processes, started by a lab, a service manager or by hand, and how a machine joins."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestnet.cli.settings import AgentSettings, ControllerSettings
from nestnet.model.errors import Usage


def controller(settings: ControllerSettings) -> None:
    """Serve the API until SIGTERM."""
    gc.disable()  # Until it answers there is nothing to collect, and looking for it takes a tenth of the start.
    from nestnet.api.server import serve

    life = settings.certificate_hours * 3600
    state = Path(settings.state)
    serve(state / "store.db", settings.listen, settings.group, settings.names, life, started)


def started() -> None:
    """What the controller has made until now stays as long as it: it is not looked at again and again."""
    gc.freeze()
    gc.enable()
    ready()


def agent(settings: AgentSettings, token: str | None) -> None:
    """Make this machine what the controller wants it to be, until SIGTERM. `token`: to join with first, unless it has
    joined."""
    from nestnet.agent.agent import run

    if not settings.machine:
        raise Usage("which machine is this? `nestnet join` writes it down, --machine says it")
    state = Path(settings.state) if settings.state is not None else None
    where = (settings.machine, settings.controller, Path(settings.pins))
    guests = Path(settings.guests) if settings.guests is not None else None
    run(*where, settings.workloads, settings.metrics, state, settings.relay, token, guests, ready)


def join(url: str, token: str, machine: Mapping[str, Any], state: Path) -> None:
    """Join as a machine: its key and certificate are in `state` then."""
    from nestnet.agent import credentials

    credentials.join(url, token, machine, state)


def ready() -> None:
    """Tell the service manager, if one asked to be told (sd_notify(3))."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.connect("\0" + path[1:] if path.startswith("@") else path)
            notify.sendall(b"READY=1")
