"""What /metrics of the controller says.

Labels hold kinds, routes, methods, statuses, and the names of the first SERIES machines: nothing that strangers can
make more of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from threading import Lock

from nestnet import __version__
from nestnet.model.exposition import Family, one
from nestnet.store.store import Store

SERIES = 1000  # Machines that metrics name at most.


class Counts:
    """What is counted as it happens. Threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()  # method, route, status
        self._seconds: dict[tuple[str, str, int], float] = {}
        self._streams: Counter[str] = Counter()

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request was answered, or ended without."""
        key = (method, route, status)
        with self._lock:
            self._requests[key] += 1
            self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    async def while_open(self, stream: str, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The lines of a stream, which is counted as long as it is open."""
        self._streams[stream] += 1
        try:
            async for line in lines:
                yield line
        finally:
            self._streams[stream] -= 1

    def families(self) -> Iterator[Family]:
        """All of it."""
        with self._lock:
            requests, seconds, streams = dict(self._requests), dict(self._seconds), dict(self._streams)
        labels = {key: {"method": key[0], "route": key[1], "code": str(key[2])} for key in requests}
        help = "Requests answered."
        yield Family("nestnet_http_requests_total", "counter", help, [(labels[k], n) for k, n in requests.items()])
        help = "Time that answering took; of a stream, as long as it was open."
        times = [(labels[k], n) for k, n in seconds.items()]
        yield Family("nestnet_http_request_seconds_total", "counter", help, times)
        open_now = [({"stream": name}, float(n)) for name, n in streams.items()]
        yield Family("nestnet_streams", "gauge", "Streams that are open.", open_now)


def measured(store: Store, counts: Counts, refused: int) -> Iterator[Family]:
    """What /metrics says. Labels hold kinds, routes, statuses, and the names of the first SERIES machines."""
    status = store.status()
    commits, turns = store.commits
    yield Family("nestnet_build_info", "gauge", "The version that runs.", [({"version": __version__}, 1)])
    yield one("nestnet_revision", "gauge", "Revision of the desired state.", status["revision"])
    objects = store.counts().items()
    yield Family("nestnet_objects", "gauge", "Objects that are stored.", [({"kind": k}, n) for k, n in objects])
    machines = status["machines"][:SERIES]
    yield Family(
        "nestnet_machine_realised_revision",
        "gauge",
        "Last revision that a machine has realised.",
        [({"machine": m["name"]}, m["realised"]) for m in machines if m["realised"] is not None],
    )
    yield Family(
        "nestnet_machine_report_age_seconds",
        "gauge",
        "Time since a machine's last report.",
        [({"machine": m["name"]}, m["reported"]) for m in machines if m["reported"] is not None],
    )
    yield Family(
        "nestnet_machine_problems",
        "gauge",
        "Problems that a machine reports.",
        [({"machine": m["name"]}, len(m["problems"])) for m in machines],
    )
    yield from counts.families()
    yield one("nestnet_http_rate_limited_total", "counter", "Requests refused for a tenant's rate.", refused)
    yield one("nestnet_store_commits_total", "counter", "Commits since the start.", commits)
    yield one("nestnet_store_writes_total", "counter", "Requests that these commits were for.", turns)
