"""What must not be in any file of the repository: what belongs to one computer, and what is not finished."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A bracket in each pattern keeps this file from finding itself.
FORBIDDEN = {
    r"\bT[O]DO\b|\bF[I]XME\b|\bX[X]X\b": "not finished: do it, or say in the docs what is missing",
    r"p[y]pi\.org|p[y]thonhosted\.org|npm[j]s\.org|npm[j]s\.com|crates\.[i]o|proxy\.golang[.]org": "a registry's host: "
    "which one is used is for each computer to say",
    r"(?<![\w.])/(?:w[o]rk|opt/p[y]pi|opt/wh[e]els)/": "a path of one computer",
    r"(?i)claud[e]|\bLL[M]s?\b|\ba[i] (?:agent|model|assistant)": "who or what wrote it is of no use to a reader",
}


def tracked() -> list[Path]:
    """Files that git knows, and files it would take up."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def test_no_forbidden_words() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for pattern, why in FORBIDDEN.items():
            for match in re.finditer(pattern, text):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: {match.group()!r}: {why}")
    assert not found, "\n" + "\n".join(found)


def test_pinned_requirements_have_hashes_and_nothing_of_this_computer() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        text = (ROOT / name).read_text()
        pins = re.findall(
            r"^([a-z0-9-]+)==[\w.]+ \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE
        )
        assert len(pins) == len(re.findall(r"^[a-z]", text, re.MULTILINE))
        assert not re.search(r"^--|://", text, re.MULTILINE)
