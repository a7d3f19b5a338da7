"""Text that is recorded in the repository: compared by tests, rewritten by scripts/golden."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REWRITE = os.environ.get("NESTNET_GOLDEN") == "rewrite"


def same(path: Path, text: str, by: str = "scripts/golden") -> None:
    """`path` has exactly this text, or gets it when a script runs: `by`."""
    if REWRITE and (not path.exists() or path.read_text() != text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: {by} writes it"
    assert path.read_text() == text, f"{path.relative_to(ROOT)} is not current: {by} rewrites it"
