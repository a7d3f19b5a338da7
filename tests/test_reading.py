"""The process that reads the lines of long batches: real ones, killed meanwhile, with a controller and without."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from killing import opened
from test_api import Controller
from test_batch import line, lines_of, prepare, sending
from test_retry import running

from nestnet.api.client import Client
from nestnet.api.create import HERE
from nestnet.api.reading import Reader
from nestnet.model.lines import read
from nestnet.store.create import PART

LONG = (HERE + 3) * PART + PART // 2


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Controller]:
    with running(tmp_path / "batch") as made:
        with Client(made.url) as client:
            prepare(client)
        yield made


def readers(pid: int) -> list[int]:
    """The processes of a process."""
    return [int(one.name) for one in Path("/proc").glob("[0-9]*") if parent(int(one.name)) == pid]


def parent(pid: int) -> int | None:
    """None: it has ended."""
    with suppress(OSError):
        state, above, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(above) if state != "Z" else None
    return None


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def named_long(controller: Controller) -> int:
    with opened(controller.db) as store:
        (count,) = store.execute("SELECT count(*) FROM network WHERE name GLOB 'long-*'").fetchone()
    return int(count)


def test_it_says_what_is_said_without_it() -> None:
    named = {"ports": {"b": {"segment": "lan", "host": "m2", "groups": ["web", "db"], "address": ["10.0.0.9"]}}}
    policies = [{"from": "web", "to": ["db", "10.0.0.0/8"], "deny": ["tcp/80-90", "icmp"], "priority": 7}]
    plain = [line("x", **named, policies=policies, labels={"a": "ä"}, carrier="acme/over", tenant="acme"), line("y")]
    wrong, empty = [line("x"), b"{"], [b""]
    assert read(plain) is not None
    reader = Reader()
    with reader.used():
        for part in (plain, wrong, empty, plain):
            assert reader.read(part) == (read(part) if part is plain else None)


def test_one_that_is_killed_is_replaced() -> None:
    reader = Reader()
    with reader.used():
        for name in ("a", "b", "c"):
            part = lines_of(name, 3)
            assert reader.read(part) == read(part)
            assert name == "b" or reader._process is not None
            if reader._process is not None:
                os.kill(reader._process.pid, signal.SIGKILL)


def test_it_ends_with_the_last_who_uses_it() -> None:
    """Who has left while lines are read is who uses it no longer."""
    reader = Reader()
    with reader.used():
        with reader.used():
            reader.read(lines_of("a", 1))
        assert reader._process is not None
        pid = reader._process.pid
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(reader.read, lines_of(f"b{n}", PART)) for n in range(5)]
    assert parent(pid) is None
    assert [one.result() for one in answers] == [read(lines_of(f"b{n}", PART)) for n in range(5)]


@pytest.mark.parametrize("ends", ["the batch", "the process", "the controller"])
def test_it_is_there_while_a_long_batch_is(controller: Controller, ends: str) -> None:
    """Without it the batch goes on; without the controller it ends."""
    assert controller.process is not None
    pid, lines = controller.process.pid, lines_of("long", LONG)
    body = b"\n".join(lines)
    first = b"\n".join(lines[: (HERE + 1) * PART]) + b"\n"
    with sending(controller, len(body), "long") as sent:
        sent.send(first[:-1])  # the part after HERE of them is not there yet
        for _ in range(HERE):
            sent.hear()
        assert not readers(pid)
        sent.send(b"\n")
        sent.hear()
        (reader,) = readers(pid)
        if ends == "the controller":
            controller.stop(signal.SIGKILL)
        else:
            if ends == "the process":
                os.kill(reader, signal.SIGKILL)
            sent.send(body[len(first) :])
            answers = [json.loads(sent.hear()) for _ in range(3)]
            assert [one["networks"] for one in answers] == [(HERE + 2) * PART, (HERE + 3) * PART, LONG]
            assert named_long(controller) == LONG
            assert ("lines are read here" in controller.log.read_text()) == (ends == "the process")
    until(lambda: parent(reader) is None, f"the end of process {reader}")
    if ends != "the controller":
        assert not readers(pid)
