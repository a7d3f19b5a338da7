"""The manuals are run: every shell block of README.md and docs/, in order, one shell for each page.

    ```bash     is run as it stands; each line must succeed   (also ```shell)
    ```console  `$ ` lines are run; what stands below one is what it prints, `...` for anything, and it must succeed
                unless the next line is `$ echo $?`
    ```text     and all others are for the reader only

A page is read as by somebody who has cloned the repository and stands in it as root: `git clone` and the first `cd
nestnet` are taken as done, and `make test`, `make bench` and `make soak` are only looked up, since this is one of the
tests. Look at one page: pytest tests/test_docs.py -k README
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nestnet.lab.down import tear_down
from nestnet.lab.state import labs, locked

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECONDS = 300  # for a page

PREAMBLE = """
set -uo pipefail
git() { [ "${1:-}" = clone ] || command git "$@"; }
cd() { if [ "$PWD" = "$ROOT" ] && [ "${1:-}" = nestnet ] && [ -e Makefile ]; then return; fi; builtin cd "$@"; }
make() { case "${1:-}" in test | bench | soak) command make --dry-run "$@" ;; *) command make "$@" ;; esac; }
apt-get() { command apt-get --simulate "$@"; }
"""


@dataclass(frozen=True)
class Step:
    """One piece that is run at once: a whole ```bash block, or one `$ ` command. `line` is counted in its page."""

    line: int
    code: str
    strict: bool  # every line of it must succeed, not the last alone
    prints: str | None = None  # what it must print; None: anything
    may_fail: bool = False


def blocks(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Line of the first content line, language and lines of each fenced block."""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if opened := re.match(r"( *)(`{3,}|~{3,})\s*([\w-]*)", line):
            indent, fence, language = opened.groups()
            content = []
            for _, inner in lines:
                if re.fullmatch(rf" *{fence[0]}{{{len(fence)},}}\s*", inner):
                    break
                content.append(inner.removeprefix(indent))
            yield number + 1, language, content


def steps(text: str) -> list[Step]:
    found: list[Step] = []
    for line, language, content in blocks(text):
        if language in ("bash", "shell"):
            found.append(Step(line, "\n".join(content), strict=True))
        elif language == "console":
            found += console_steps(line, content)
    return found


def console_steps(start: int, content: list[str]) -> list[Step]:
    commands: list[tuple[int, list[str], list[str]]] = []
    for line, row in enumerate(content, start):
        if re.match(r"[$#] ", row):
            commands.append((line, [row[2:]], []))
        elif commands and row.startswith("> ") and not commands[-1][2]:
            commands[-1][1].append(row[2:])
        elif commands:
            commands[-1][2].append(row)
    following = [code for _, code, _ in commands[1:]] + [[""]]
    return [
        Step(line, "\n".join(code), False, "\n".join(output).strip() or None, after[0].strip() == "echo $?")
        for (line, code, output), after in zip(commands, following, strict=True)
    ]


def matches(want: str, got: str) -> bool:
    """Whether got is want, where `...` stands for anything, and all white space is alike."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in want.split("...")]
    return re.fullmatch(r"\s*" + r"\s*.*\s*".join(parts) + r"\s*", got, re.DOTALL) is not None


def script(page: list[Step], folder: Path) -> str:
    """One shell script of all steps: N.out gets what step N prints, N.status its exit status."""
    parts = [f"ROOT={shlex.quote(str(ROOT))}", PREAMBLE, "status=0"]
    for number, step in enumerate(page):
        out = shlex.quote(str(folder / f"{number}.out"))
        result = shlex.quote(str(folder / f"{number}.status"))
        # A failing line of a strict block ends the shell, from the block's own `set -e`, so nothing writes .status.
        before, after = ("set -e", "set +e") if step.strict else ("(exit $status)", ":")
        parts.append(f"{{ {before}\n{step.code}\nstatus=$?; {after}; }} >{out} 2>&1\necho $status >{result}")
        if not step.may_fail and not step.strict:
            parts.append("[ $status = 0 ] || exit $status")
    return "\n".join(parts) + "\n"


def run(page: list[Step], folder: Path, seconds: float = SECONDS) -> str | None:
    """Runs the steps in a new shell; what went wrong, with line number and output, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "page.bash"
    path.write_text(script(page, folder))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {"NO_COLOR": "1"}
    shell = subprocess.Popen(
        ["bash", "--norc", str(path)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        shell.wait(seconds)
        late = ""
    except subprocess.TimeoutExpired:
        late = f" (the page took longer than {seconds} s)"
    finally:
        # Whatever a page leaves in the background ends with the page.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
    for number, step in enumerate(page):
        output = folder / f"{number}.out"
        printed = output.read_text(errors="replace") if output.exists() else ""
        status = folder / f"{number}.status"
        failed = not status.exists() or (status.read_text().strip() != "0" and not step.may_fail)
        if failed:
            return f"line {step.line} failed{late}:\n{step.code}\n--- printed:\n{printed}"
        if step.prints is not None and not matches(step.prints, printed):
            return (
                f"line {step.line} printed something else:\n{step.code}\n--- page:\n{step.prints}\n--- got:\n{printed}"
            )
    return None


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_over() -> None:
    """Pages name their labs: what a killed run has left is taken away; labs in which something runs stay."""
    for name in labs():
        with locked(name) as lab:
            if not any(process.alive() for process in lab.processes):
                tear_down(lab)


@pytest.mark.root
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page: Path, tmp_path: Path) -> None:
    """What a page tells to type works, in its order."""
    if found := steps(page.read_text()):
        problem = run(found, tmp_path / "page")
        assert problem is None, f"{page.relative_to(ROOT)}: {problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```bash\ntrue\n```\n", None),
        ("```bash\nfalse\ntrue\n```\n", "line 2 failed"),
        ("text\n```bash\nx=1\n```\n\n```bash\n[ $x = 2 ]\n```\n", "line 7 failed"),
        ("```bash\ngit clone nowhere\ncd nestnet\nmake test\n```\n", None),
        ("```text\nfalse\n```\n```python\nfalse\n```\n", None),
        ("```console\n$ echo a   b\na b\n$ printf 'one\\ntwo\\nthree\\n'\none\n...\nthree\n```\n", None),
        ("```console\n$ echo a\nb\n```\n", "line 2 printed something else"),
        ("```console\n$ false\n```\n", "line 2 failed"),
        ("```console\n$ (exit 4)\n$ echo $?\n4\n```\n", None),
        ("```console\n$ echo one \\\n> two\none two\n```\n", None),
        ("```console\n$ x=3\n```\n```bash\n[ $x = 3 ]\nexit 1\n```\n", "line 5 failed"),
        ("- list\n  ```bash\n  cat <<X\n  a\n  X\n  ```\n", None),
        ("```bash\nsleep 100\n```\n", "longer than"),
    ],
)
def test_how_pages_are_read(text: str, problem: str | None, tmp_path: Path) -> None:
    found = run(steps(text), tmp_path, seconds=1 if problem == "longer than" else 20)
    assert (found is None) if problem is None else (found is not None and problem in found), found
