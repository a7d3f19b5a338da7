"""What went wrong, as JSON says it (RFC 9457)."""

from __future__ import annotations

from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from nestnet.model import errors


def problem(error: errors.NestnetError) -> dict[str, Any]:
    """What went wrong (RFC 9457)."""
    fields: dict[str, Any] = {
        "type": f"urn:nestnet:error:{error.code}",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
    }
    if isinstance(error, errors.Invalid):
        fields["problems"] = [asdict(problem) for problem in error.problems]
        fields["detail"] = error.problems[0].message if len(error.problems) == 1 else f"{len(error.problems)} problems"
    for name in ("dependants", "candidates", "changes", "limit", "nearest"):
        if getattr(error, name, None) not in (None, ()):
            fields[name] = getattr(error, name)
    return fields
