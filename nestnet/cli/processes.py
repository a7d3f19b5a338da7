"""The two processes, started by a lab, a service manager or by hand: `nestnet controller` and `nestnet agent`."""

from __future__ import annotations

from pathlib import Path


def controller(listen: str, state: Path) -> None:
    """Serve the API at `listen` (unix:PATH or http://HOST:PORT) until SIGTERM, with the store in `state`."""
    from nestnet.api.server import serve

    serve(state / "store.db", listen)


def agent(machine: str, controller: str, pins: Path, workloads: str | None, metrics: str | None) -> None:
    """Make this machine what the controller wants it to be, until SIGTERM."""
    from nestnet.agent.agent import run

    run(machine, controller, pins, workloads, metrics)
