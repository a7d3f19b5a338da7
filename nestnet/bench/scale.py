"""All that is measured of size, and docs/scale.md: `make bench-scale`, some minutes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

TITLES = {
    "create": "How fast networks are made",
    "serve": "One controller, by how many networks it has",
    "feed": "From a commit to a thousand machines",
    "sync": "From the feed to a machine's maps",
}
HEAD = """\
# Scale

Made by `make bench-scale`: what each command printed, and what it measures. Times are of the computer that they name;
lines that begin with MISSED say what was hoped for and not reached. How fast the datapath is by how many networks there
are: [performance](performance.md).
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nestnet.bench.scale", description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, nargs="?", help="the page to write, else it is shown")
    options = parser.parse_args()
    parts, code = [HEAD], 0
    for name, title in TITLES.items():
        module = f"nestnet.bench.{name}"
        done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, check=False)
        missed = [f"* {line}" for line in done.stderr.splitlines() if line.startswith("MISSED")]
        code = code or done.returncode
        about = (import_module(module).__doc__ or "").strip()
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        parts.append(f"## {title}\n\n{about}\n\n{today}, on {done.stdout.strip()}\n")
        parts += ["\n".join(missed) + "\n"] if missed else []
        print(f"{name}: {done.stdout}{done.stderr}", file=sys.stderr)
    text = "\n".join(parts)
    if options.page:
        options.page.write_text(text)
    else:
        print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
