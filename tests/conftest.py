"""What all tests share: hypothesis profiles, and one worker for the tests that need the machine for themselves.

A test (or a module, by `pytestmark`) marked `root` makes namespaces, loads BPF or starts processes. It fails where it
cannot run; it is never skipped. `pytest -m "not root"` leaves these out.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("nestnet", deadline=None, print_blob=True)
settings.register_profile("soak", parent=settings.get_profile("nestnet"), max_examples=2000)
settings.load_profile("nestnet")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One xdist worker gets all `root` tests, so they run one after another."""
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.xdist_group("root"))
