"""Contexts: controllers that somebody talks to, each in a file of ~/.config/nestnet that others cannot read.

~/.config/nestnet/prod.toml    controller, token, authority
~/.config/nestnet/current      the name of the one that is meant when none is named
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from nestnet.model.errors import Conflict, NestnetError, NotFound

if TYPE_CHECKING:
    from nestnet.api.client import Credentials


@dataclass(frozen=True, slots=True)
class Context:
    """A controller, and what to show it."""

    controller: str
    token: str | None = None
    authority: str | None = None

    def credentials(self) -> Credentials:
        """For a client."""
        from nestnet.api.client import Credentials

        return Credentials(self.token, self.authority)


def folder() -> Path:
    """Where they are."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nestnet"


def names() -> list[str]:
    """Their names, sorted."""
    return sorted(file.stem for file in folder().glob("*.toml"))


def current() -> str | None:
    """The name of the one that is meant when none is named."""
    try:
        return (folder() / "current").read_text().strip() or None
    except FileNotFoundError:
        return None


def load(name: str) -> Context | None:
    """The one of that name, if there is one. Raises NestnetError when its file cannot be understood."""
    file = folder() / f"{name}.toml"
    try:
        said = tomllib.loads(file.read_text())
        return Context(**said)
    except FileNotFoundError:
        return None
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise NestnetError(f"{file} is no context ({error}): remove it, and add it anew", "bad_context") from None


def add(name: str, controller: str, token: str | None) -> Context:
    """Keep a controller under a name, and mean it from now on. The controller is asked for its authority, which must be
    the one that the token names. Raises Conflict for a name that is taken, Forbidden for another authority."""
    from nestnet.api.client import Client, Credentials, trusted

    if load(name) is not None:
        raise Conflict(f"there is a context {name} already: `nestnet context remove {name}`", "duplicate_name")
    credentials = trusted(controller, token) if token is not None else Credentials()
    with Client(controller, credentials=credentials) as client:
        client.status()  # Whoever is not let in should know it now.
    context = Context(controller, credentials.token, credentials.authority)
    values = {"controller": controller, "token": context.token, "authority": context.authority}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items() if value is not None)
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder() / f"{name}.toml", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    use(name)
    return context


def use(name: str) -> None:
    """Mean this one from now on. Raises NotFound."""
    _known(name)
    (folder() / "current").write_text(f"{name}\n")


def remove(name: str) -> None:
    """Forget one. Raises NotFound."""
    _known(name)
    (folder() / f"{name}.toml").unlink()
    if current() == name:
        (folder() / "current").unlink()


def _known(name: str) -> None:
    if load(name) is None:
        raise NotFound(f"context {name}", next(iter(get_close_matches(name, names(), 1, 0.5)), None))
