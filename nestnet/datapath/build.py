"""Builds the BPF object out of bpf/*.c and bpf/*.h: `python -m nestnet.datapath.build`.

The compiler is the clang inside the `ziglang` package, so nothing has to be installed but Python packages; CLANG=clang
takes Debian's instead. The object's name has a hash of everything that it is made from, so one that exists is current:
then nothing is run and nothing printed. `reasons.h` is generated from `model/reasons.py` first; it lies next to the
objects, for editors.

    build/nestnet-HASH.bpf.o    build/include/reasons.h

`build` is the repository's folder of that name, or the user's cache when that cannot be written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from nestnet.model.errors import NestnetError
from nestnet.model.reasons import NUMBERS

SOURCES = Path(__file__).parent / "bpf"
MAIN = "nestnet.bpf.c"

FLAGS = ("-O2", "-g", "-mcpu=v3", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-Wall", "-Werror")


class BuildError(NestnetError):
    """The compiler refused the sources, or there is no compiler. The message has what it said."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "datapath_build")


def reasons_header() -> str:
    """`enum reason` as C: the same names and numbers as in `model/reasons.py`."""
    lines = [f"    REASON_{name.upper()} = {number}," for name, number in NUMBERS.items()]
    return "\n".join(
        ["/* Generated from nestnet/model/reasons.py. */", "#pragma once", "", "enum reason {", *lines, "};", ""]
    )


def folder() -> Path:
    """Where objects go: `build/` of the repository, or a cache of the user's when this is no writable repository."""
    root = Path(__file__).parents[2]
    if (root / "pyproject.toml").exists() and os.access(root, os.W_OK):
        return root / "build"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "nestnet"


def compiler() -> list[str]:
    """The command that compiles C to BPF, without flags for what is compiled."""
    if chosen := os.environ.get("CLANG"):
        return [*shlex.split(chosen), "-target", "bpf"]
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError("no compiler for BPF: install the Python package ziglang, or set CLANG=clang")
    return [sys.executable, "-m", "ziglang", "cc", "-target", "bpfel-freestanding-none"]


def object_path(sources: Path = SOURCES, defines: Mapping[str, str | int] | None = None) -> Path:
    """The BPF object of these sources, built first if there is none yet.

    Raises `BuildError` with the compiler's words. Safe to be called by several processes at once.
    """
    headers = {"reasons.h": reasons_header()}
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in (defines or {}).items())]
    texts = {path.name: path.read_bytes() for path in sorted(sources.glob("*.[ch]"))}
    if MAIN not in texts:
        raise BuildError(f"{sources} has no {MAIN}")
    digest = hashlib.sha256(repr((texts, headers, flags, os.environ.get("CLANG"))).encode()).hexdigest()[:16]
    path = folder() / f"nestnet-{digest}.bpf.o"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, text in headers.items():
            _write(path.parent / "include" / name, text)
        _compile(sources / MAIN, path, flags)
    return path


def _write(path: Path, text: str) -> None:
    """Whoever reads at the same time sees the whole old text or the whole new one."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(path)


def _compile(source: Path, path: Path, flags: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [*compiler(), *flags, f"-I{path.parent / 'include'}", f"-I{source.parent}"]
        # Zig keeps caches of its own: here, not in the folder that somebody happens to stand in.
        cache = {"ZIG_LOCAL_CACHE_DIR": scratch, "ZIG_GLOBAL_CACHE_DIR": str(path.parent / "zig")}
        try:
            done = subprocess.run(
                [*command, "-c", str(source), "-o", str(made)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=cache | os.environ,
                check=False,
            )
        except OSError as error:
            raise BuildError(f"cannot run {command[0]}: {error}") from error
        if done.returncode:
            raise BuildError(f"{source} does not compile\n{done.stderr.strip()}")
        made.replace(path)


def main() -> int:
    """Build if the sources changed; say so only then."""
    before = set(folder().glob("*.bpf.o"))
    try:
        path = object_path()
    except BuildError as error:
        print(f"build: {error}", file=sys.stderr)
        return 1
    if path not in before:
        print(f"built {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
