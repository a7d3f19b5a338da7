"""What the manuals say is what the code has: pages made from it, and the README's promises to a hurried reader.

That their commands work is for test_docs.py. scripts/golden rewrites what is generated.
"""

from __future__ import annotations

import re
from pathlib import Path

import hostile
import pytest
from golden_files import ROOT, same

from nestnet.model.reasons import NUMBERS, REASONS

README = ROOT / "README.md"
MANUALS = sorted(
    path
    for pattern in ("*.md", "*/README.md", "docs/**/*.md", "nestnet/**/README.md")
    for path in ROOT.glob(pattern)
    if not path.parts[len(ROOT.parts)].startswith(".")
)


def test_golden_drops_page_is_current() -> None:
    rows = "".join(f"| {NUMBERS[name]} | `{name}` | {why} |\n" for name, why in REASONS.items())
    page = ROOT / "docs" / "drops.md"
    before, _, rest = page.read_text().partition("<!-- reasons -->\n")
    after = rest.partition("<!-- /reasons -->\n")[2]
    table = "| number | reason | what it means |\n|---|---|---|\n" + rows
    same(page, f"{before}<!-- reasons -->\n{table}<!-- /reasons -->\n{after}")


def test_readme_is_short_and_soon_says_what_to_type() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert next(number for number, line in enumerate(lines, 1) if line == "```bash") < 20


def test_readme_shows_the_example_as_it_is() -> None:
    _, _, text = (ROOT / "examples" / "nested.yaml").read_text().partition("\n")  # the first line is for editors
    assert f"```yaml\n{text}```\n" in README.read_text()


def test_every_folder_says_what_it_is_for() -> None:
    folders = {path.parent for path in (ROOT / "nestnet").glob("*/__init__.py")} | {
        ROOT / "nestnet" / "datapath" / "bpf",
        ROOT / "tests",
        ROOT / "examples",
        ROOT / "bench",
    }
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "README.md").exists()]


@pytest.mark.parametrize("page", MANUALS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path = target.partition("#")[0]
        if path and "://" not in path and not (page.parent / path).exists():
            dead.append(target)
    assert not dead


def test_every_test_is_in_the_list_of_tests() -> None:
    text = (ROOT / "tests" / "README.md").read_text()
    assert not [path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if f"`{path.name}`" not in text]


def test_every_hostile_row_has_a_test_that_exists_or_says_why_not() -> None:
    rows = re.findall(r"^\| ([A-F]\d+) \| .+ \| (.+) \|$", (ROOT / "docs" / "hostile.md").read_text(), re.MULTILINE)
    many = {"A": 28, "B": 18, "C": 20, "D": 20, "E": 14, "F": 13}
    assert [name for name, _ in rows] == [f"{part}{n}" for part, count in many.items() for n in range(1, count + 1)]
    for name, where in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)", where)
        assert named or "later: " in where or "not promised: " in where, name
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (name, file, test)
    # And the other way round: what is made for a row is shown there.
    for name in (*hostile.ROWS, *hostile.WIRE_ROWS.keys() - {"fuzzed"}):
        assert f"[{name}]" in dict(rows)[name]


def test_every_decision_is_in_the_list_of_decisions() -> None:
    folder = ROOT / "docs" / "decisions"
    text = (folder / "README.md").read_text()
    assert not [path.name for path in sorted(folder.glob("2*.md")) if f"({path.name})" not in text]
