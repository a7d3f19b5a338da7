"""The verbs by which somebody becomes known: tenant, token, join, fence, context."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nestnet.cli import contexts, settings
from nestnet.cli import output as out
from nestnet.cli.changes import say
from nestnet.cli.find import target
from nestnet.cli.formats import Format
from nestnet.model.errors import NestnetError, NotFound, Usage
from nestnet.model.rates import rate_text

TOKEN = "NESTNET_TOKEN"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str | None) -> float | None:
    """'90d' -> 7776000.0. Raises Usage."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise Usage(f"{text!r} is no time: write a number and s, m, h or d, as 12h")
    return float(found[1]) * UNITS[found[2]]


def make_token(
    name: str, tenants: Sequence[str], operator: bool, reader: bool, ttl: str | None, lab: str | None
) -> None:
    """Make a token, and print it."""
    roles = {}
    for text in tenants:
        tenant, equals, role = text.partition("=")
        roles[tenant] = role if equals else "owner"
        if roles[tenant] not in ("owner", "reader"):
            raise Usage(f"--tenant {text}: a role is owner or reader")
    if operator + reader + bool(roles) != 1:
        raise Usage("give one of --tenant, --operator and --reader")
    everything = "owner" if operator else "reader" if reader else None
    with target(lab).client() as client:
        made = client.make_token(name, everything, roles, seconds(ttl))
    print(made["token"])
    say(f"token {name}: keep it, it is not told again; `nestnet delete token {name}` revokes it")


def make_tenant(name: str, parent: str | None, quota: Mapping[str, str | None], lab: str | None) -> None:
    """Make a tenant."""
    with target(lab).client() as client:
        made = client.make_tenant(name, parent, limits(quota))
    say(f"tenant {made['name']} is made" + (f", below {made['parent']}" if made["parent"] else ""))


def set_tenant(name: str, quota: Mapping[str, str | None], lab: str | None) -> None:
    """Give a tenant other limits."""
    given = limits(quota)
    if not given:
        raise Usage(f"give at least one of {', '.join(f'--{what}' for what in quota)}")
    with target(lab).client() as client:
        tenant = client.set_tenant(name, given)["tenant"]
    told = ", ".join(_amount(what, n) for what, n in tenant["quota"].items())
    say(f"tenant {tenant['name']} may have {told}")


def _amount(what: str, n: int | None) -> str:
    if what == "rate":
        return f"a rate of {rate_text(n)}" if n is not None else "any rate"
    return f"{n if n is not None else 'any number of'} {what}"


def suspend(name: str, suspended: bool, lab: str | None) -> None:
    """Suspend a tenant, or resume it."""
    with target(lab).client() as client:
        tenant = client.set_tenant(name, suspended=suspended)["tenant"]
    if tenant["suspended"] == suspended:
        say(f"tenant {tenant['name']} is {'suspended' if suspended else 'resumed'}")
    else:
        say(f"tenant {tenant['name']} is resumed, and closed as long as one above it is suspended")


def limits(quota: Mapping[str, str | None]) -> dict[str, int | str | None]:
    """Those that were given; 'none' takes one away. Raises Usage."""
    found: dict[str, int | str | None] = {}
    for what, text in quota.items():
        if text is not None and text != "none" and what != "rate" and not re.fullmatch(r"[0-9]{1,10}", text):
            raise Usage(f"--{what} is a number, or none, not {text}")
        if text is not None:
            found[what] = None if text == "none" else text if what == "rate" else int(text)
    return found


def let_join(machine: str, ttl: str, lab: str | None) -> None:
    """Make a token that lets a machine join, and print it."""
    with target(lab).client() as client:
        made = client.let_join(machine, seconds(ttl) or 0)
    print(made["token"])
    who, how = f"machine {machine}", f"join CONTROLLER --machine {machine} ..."
    if "/" in machine:
        who = f"what runs on port {machine}"
        how = f"agent --machine {made['machine']} --token-file FILE --controller URL-OF-ITS-RELAY"
    say(f"for {who}, once, within {ttl}: there, `nestnet {how}`")


def read_token(file: str | None) -> str | None:
    """A token from a file, from stdin (-), or from the environment: an argument could be read by everybody."""
    if file is None:
        return os.environ.get(TOKEN)
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
    except FileNotFoundError:
        raise NotFound(f"file {file}") from None
    return text.strip()


def trunks(texts: Sequence[str]) -> dict[str, str]:
    """['campus=eth1'] -> {'campus': 'eth1'}. Raises Usage."""
    found: dict[str, str] = {}
    for text in texts:
        on, _, nic = text.partition("=")
        if not on or not nic:
            raise Usage(f"--trunk {text}: write a physical network and the interface that leads there, as campus=eth1")
        if on in found:
            raise Usage(f"--trunk {text}: {found[on]} is the trunk to {on} already")
        found[on] = nic
    return found


def fence(machine: str, fenced: bool, lab: str | None, wait: bool, timeout: float) -> None:
    """Shut a machine out, or let it in again, and wait until all others know."""
    from nestnet.cli.waiting import until_realised

    found = target(lab)
    with found.client() as client:
        told = client.fence(machine, fenced)
        if wait:
            until_realised(client, told, told["machines"], timeout, found.lab)
    known = f"{len(told['machines'])} others know" if wait else "stored"
    say(f"machine {told['machine']['name']} is {'shut out' if fenced else 'let in again'}: {known}")


def list_contexts(output: Format) -> None:
    """Show the contexts."""
    current = contexts.current()
    found = []
    for name in contexts.names():
        context = contexts.load(name)
        assert context is not None
        found.append({"name": name, "controller": context.controller, "current": name == current})
    if output in (Format.json, Format.yaml):
        out.data(out.versioned("ContextList", {"items": found}), output)
        return
    rows = [("*" if one["current"] else "", str(one["name"]), str(one["controller"])) for one in found]
    out.table(("", "NAME", "CONTROLLER"), rows)


def add_context(name: str, controller: str, token_file: str | None) -> None:
    """Keep a controller under a name."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
        raise NestnetError(f"{name!r} cannot be a context's name: lower-case letters, digits and hyphens", "bad_name")
    contexts.add(name, controller, read_token(token_file))
    say(f"context {name}: commands mean {controller} from now on")


def use_context(name: str) -> None:
    """Mean a controller from now on."""
    contexts.use(name)
    say(f"commands mean context {name} from now on")


def remove_context(name: str) -> None:
    """Forget a controller."""
    contexts.remove(name)
    say(f"context {name} is forgotten")


def told_of_join(machine: str, controller: str, state: Path, config: Path) -> None:
    """Say what a machine that has joined does next."""
    said = settings.AgentSettings(controller=controller, machine=machine, state=str(state))
    settings.write(said, config)
    say(f"machine {machine} has joined; {config} says how its agent starts: `systemctl enable --now nestnet-agent`")
