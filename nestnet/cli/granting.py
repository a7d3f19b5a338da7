"""The verbs by which hosts are granted to tenants: grant, invite, redeem, revoke."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nestnet.cli.changes import say
from nestnet.cli.find import target
from nestnet.cli.identities import limits, seconds
from nestnet.model.errors import NotFound, Usage

INVITATION = "NESTNET_INVITATION"


def grant(
    tenant: str, network: str | None, hosts: Sequence[str], quota: Mapping[str, str | None], lab: str | None
) -> None:
    """Grant hosts to a tenant."""
    with target(lab).client() as client:
        made = client.grant(network, tenant, list(hosts) or None, limits(quota))
    say(f"tenant {tenant}: its networks may be carried by {_hosts(made['hosts'], made['all'])}; grant {made['name']}")


def invite(
    network: str | None, hosts: Sequence[str], quota: Mapping[str, str | None], ttl: str, lab: str | None
) -> None:
    """Make an invitation, and print it."""
    with target(lab).client() as client:
        made = client.invite_tenant(network, list(hosts) or None, limits(quota), seconds(ttl) or 0)
    print(made["invitation"])
    say(f"for {_hosts(made['hosts'], made['all'])}, once, within {ttl}: whoever has it, `nestnet redeem`")


def redeem(file: str | None, tenant: str | None, lab: str | None) -> None:
    """Redeem an invitation."""
    invitation = _read(file)
    if invitation is None:
        raise Usage(f"give --invitation-file, or set {INVITATION}")
    with target(lab).client() as client:
        made = client.redeem(invitation, tenant)
    say(f"grant {made['name']} of tenant {made['tenant']}: {_hosts(made['hosts'], made['all'])}")


def revoke(grant: str, suspend: bool, cut: bool, cascade: bool, lift: bool, grace: str, lab: str | None) -> None:
    """Revoke a grant, or do less."""
    if suspend + cut + cascade + lift > 1:
        raise Usage("give one of --suspend, --cut, --cascade and --lift")
    with target(lab).client() as client:
        if suspend or cut or lift:
            client.change_grant(grant, not lift, False if lift else True if cut else None)
            done = "is open again" if lift else "is cut: what it carries is closed" if cut else "takes nothing new"
            say(f"grant {grant} {done}")
        elif client.revoke_grant(grant, cascade, seconds(grace) or 0) is None:
            say(f"grant {grant} is revoked")
        else:
            say(f"grant {grant} is cut, and gone with all that it carries in {grace}; until then --lift undoes it")


def _hosts(names: Sequence[str], whole: bool) -> str:
    return "all hosts" if whole else f"{', '.join(names)}"


def _read(file: str | None) -> str | None:
    """From a file, from stdin (-), or from the environment: an argument could be read by everybody."""
    if file is None:
        return os.environ.get(INVITATION)
    try:
        return (sys.stdin.read() if file == "-" else Path(file).read_text()).strip()
    except FileNotFoundError:
        raise NotFound(f"file {file}") from None
