"""Every rule of validation has a file that breaks it, tests/golden/errors/NAME.yaml, and NAME.txt has what people see.

The files are judged as `nestnet up` does: nothing exists but what they have. scripts/golden rewrites the texts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_files import same

from nestnet.file import Unreadable, load
from nestnet.model.problems import CODES
from nestnet.model.validate import Known

ERRORS = Path(__file__).parent / "golden" / "errors"
FILES = sorted(ERRORS.glob("*.yaml"))


def problems(file: Path) -> Unreadable:
    with pytest.raises(Unreadable) as raised:
        load(file.read_bytes(), file.name, Known())
    return raised.value


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden_error_text(file: Path) -> None:
    same(file.with_suffix(".txt"), str(problems(file)) + "\n")


def test_golden_every_code_has_an_example() -> None:
    shown = {problem.code for file in FILES for problem in problems(file).problems}
    assert set(CODES) - shown == set(), "codes without an example"
    assert shown - set(CODES) == set(), "codes that problems.py does not list"
    assert {file.stem for file in FILES} >= set(CODES), "each code has an example of its own name"


def test_golden_no_text_without_its_file() -> None:
    assert {file.stem for file in ERRORS.glob("*.txt")} == {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden_example_shows_its_code(file: Path) -> None:
    """A file named after a code shows that code, and not a dozen others that hide it."""
    code = max((code for code in CODES if file.stem.startswith(code)), key=len, default=None)
    if code is not None:
        codes = [problem.code for problem in problems(file).problems]
        assert codes.count(code) * 2 >= len(codes)


def test_golden_messages_read_as_one_line() -> None:
    for file in FILES:
        for problem in problems(file).problems:
            assert problem.message.isprintable()
            assert problem.message[-1] not in ".:;"
            assert len(problem.message) < 400
