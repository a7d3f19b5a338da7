"""Every command, what it takes and what its help says. What it does is in the module it imports when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nestnet.cli.formats import Format, State

app = typer.Typer(
    name="nestnet",
    help="Virtual networks that carry virtual networks, to any depth.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 differences (--exit-code), 4 a check failed, "
    "7 not realised before --timeout, 8 no controller answers.",
    no_args_is_help=True,
    add_completion=False,
    # rich would take longer to import than everything else together.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Options that are not ours belong to the command that is run, also when nobody wrote `--` before it.
PASSED_ON = {"ignore_unknown_options": True}

importing = typer.Typer(
    help="Turn what others describe into a network file.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

tokens = typer.Typer(
    help="Make tokens, for people and machines.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

tenants = typer.Typer(
    help="Administer the tenants below yours.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

contexts = typer.Typer(
    help="Say which controller is meant.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Lab = Annotated[
    str | None,
    typer.Option("--lab", "--context", metavar="NAME", help="Which lab or context; needed when there are several."),
]
TokenFile = Annotated[
    str | None, typer.Option("--token-file", metavar="FILE", help="Where the token is; - for stdin; or NESTNET_TOKEN.")
]
Output = Annotated[Format, typer.Option("--output", "-o", help="How to show it.")]
File = Annotated[str, typer.Argument(metavar="FILE", help="A network file; - for stdin.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0, metavar="SECONDS", help="How long to wait at most.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the machines have realised it.")]
Prune = Annotated[bool, typer.Option("--prune", help="Delete networks of the file's tenants that it does not name.")]
Kind = Annotated[str, typer.Argument(metavar="KIND", help="ports, networks, machines ...; singular or plural.")]
Path_ = Annotated[str, typer.Argument(metavar="PATH", help="A path like acme/web1, or an id.")]
Where = Annotated[str, typer.Argument(metavar="PORT|MACHINE", help="A port like acme/web1, or a machine like m1.")]


@app.command()
def up(
    file: File,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="The lab's name; else the file's.")] = None,
    timeout: Timeout = 60,
) -> None:
    """Make the machines of FILE here, and apply it.

    Machines and workloads are namespaces on this computer; the controller and the agents are the real ones.
    All of it comes up, or nothing stays.
    """
    from nestnet.cli import changes

    changes.up(file, name, timeout)


@app.command()
def down(
    name: Annotated[str | None, typer.Option("--name", "--lab", "--context", metavar="NAME", help="Which lab.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All labs on this computer.")] = False,
) -> None:
    """Take a lab away.

    Everything that `up` made goes, and whatever runs inside. It works whatever was killed before, and is no error
    when nothing is up.
    """
    from nestnet.cli import changes

    changes.down(name, every)


@app.command()
def plan(
    file: File,
    lab: Lab = None,
    prune: Prune = False,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 3 when there are differences.")] = False,
    output: Output = Format.table,
) -> None:
    """Show what `apply` would change and disturb."""
    from nestnet.cli import changes

    if changes.plan(file, lab, prune, output) and exit_code:
        sys.exit(3)


@app.command()
def apply(
    file: File,
    lab: Lab = None,
    prune: Prune = False,
    wait: Wait = True,
    timeout: Timeout = 60,
    output: Output = Format.table,
) -> None:
    """Make the networks of FILE what it says.

    All or nothing is stored; then it waits until every machine concerned has realised it. The file is the whole
    truth about each network it names, and says nothing about others.
    """
    from nestnet.cli import changes

    changes.apply(file, lab, prune, wait, timeout, output)


@app.command()
def batch(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A network a line, as JSON; - for stdin.")],
    key: Annotated[
        str | None, typer.Option("--key", metavar="TEXT", help="What tells this run from others; else what FILE says.")
    ] = None,
    lab: Lab = None,
) -> None:
    """Make many networks, one of each line.

    Each thousand lines are made together, or not at all. What was cut off, or had a wrong line, is run again: what is
    there is not made twice.
    """
    from nestnet.cli import batches

    batches.batch(file, key, lab)


@app.command()
def get(
    kind: Kind,
    path: Annotated[
        str | None, typer.Argument(metavar="PATH", help="Only this one, by path or id; of hosts: whose.")
    ] = None,
    network: Annotated[
        str | None, typer.Option("--network", "-n", metavar="PATH", help="Only of this network.")
    ] = None,
    lab: Lab = None,
    output: Output = Format.table,
) -> None:
    """List the objects of a kind, or show one."""
    from nestnet.cli import views

    views.get(kind, path, network, lab, output)


@app.command()
def describe(kind: Kind, path: Path_, lab: Lab = None) -> None:
    """Show everything about one object."""
    from nestnet.cli import views

    views.describe(kind, path, lab)


@app.command()
def delete(
    kind: Kind,
    path: Path_,
    lab: Lab = None,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="A network or tenant: with all that is in it, carried by it, or below it.")
    ] = False,
    wait: Wait = True,
    timeout: Timeout = 60,
) -> None:
    """Delete one object.

    Refused, with a list, while others depend on it or, of a network or tenant, while anything is in it.
    """
    from nestnet.cli import changes

    changes.delete(kind, path, cascade, lab, wait, timeout)


@app.command()
def link(
    state: Annotated[State, typer.Argument(metavar="up|down", help="What it should be.")],
    path: Annotated[str, typer.Argument(metavar="PATH", help="A link like acme/core-edge, or its id.")],
    lab: Lab = None,
    wait: Wait = True,
    timeout: Timeout = 60,
) -> None:
    """Take a link up or down.

    Routes that led over it take other ways, or are gone. It stays so until this command or a file that has `up:`
    says otherwise.
    """
    from nestnet.cli import changes

    changes.link(path, state is State.up, lab, wait, timeout)


Switched = Annotated[str, typer.Argument(metavar="network|port", help="What PATH is.")]


@app.command()
def enable(kind: Switched, path: Path_, lab: Lab = None, wait: Wait = True, timeout: Timeout = 60) -> None:
    """Take a network or port up again.

    It comes back as it was, and what hangs above with it.
    """
    from nestnet.cli import changes

    changes.enable(kind, path, True, lab, wait, timeout)


@app.command()
def disable(kind: Switched, path: Path_, lab: Lab = None, wait: Wait = True, timeout: Timeout = 60) -> None:
    """Take a network or port down.

    Nothing passes it; what hangs above is closed, and is `down: carrier`. It stays so until `enable` or a file that
    has `enabled:`.
    """
    from nestnet.cli import changes

    changes.enable(kind, path, False, lab, wait, timeout)


@app.command()
def recarry(
    path: Annotated[str, typer.Argument(metavar="NETWORK", help="A path like acme/staging, or an id.")],
    carrier: Annotated[
        str | None, typer.Option("--carrier", metavar="NETWORK", help="The network that is to carry it.")
    ] = None,
    wire: Annotated[bool, typer.Option("--wire", help="The wire is to carry it.")] = False,
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="PORT=HOST", help="Where a port is to live; may be repeated."),
    ] = None,
    lab: Lab = None,
    wait: Wait = True,
    timeout: Timeout = 60,
) -> None:
    """Let another network carry this one.

    What it carries comes along. Its ports go to hosts of the new carrier: to those that --host names, else to those
    that are called as their own were. They are closed on the way, and their connections end.
    """
    from nestnet.cli import changes

    if (carrier is None) != wire:
        raise typer.BadParameter("give one of --carrier and --wire")
    named = dict(one.partition("=")[::2] for one in hosts or [])
    if bad := next((port for port, host in named.items() if not port or not host), None):
        raise typer.BadParameter(f"--host is PORT=HOST, not {bad}")
    changes.recarry(path, carrier, named, lab, wait, timeout)


@app.command()
def attach(
    path: Annotated[str, typer.Argument(metavar="PORT", help="A port like acme/web1, or its id.")],
    netns: Annotated[
        str | None, typer.Option("--netns", metavar="NAME", help="A network namespace of the port's machine.")
    ] = None,
    tap: Annotated[
        str | None, typer.Option("--tap", metavar="NAME", help="A tap device there; made if it does not exist.")
    ] = None,
    lab: Lab = None,
    wait: Wait = True,
    timeout: Timeout = 60,
) -> None:
    """Say what a port's workload hangs on.

    A namespace gets an interface with the port's MAC, addresses and routes. What hangs on a tap, a virtual machine,
    is told them by DHCP and router advertisements. It stays so until `detach` or a file that has `attach:`.
    """
    from nestnet.cli import changes

    if (netns is None) == (tap is None):
        raise typer.BadParameter("give one of --netns and --tap")
    wanted = {"netns": netns} if netns is not None else {"tap": str(tap)}
    changes.attach(path, wanted, lab, wait, timeout)


@app.command()
def move(
    path: Annotated[str, typer.Argument(metavar="PORT", help="A port like acme/web1, or its id.")],
    to: Annotated[str, typer.Option("--to", metavar="HOST", help="A machine, or a host port of what carries it.")],
    lab: Lab = None,
    wait: Wait = True,
    timeout: Timeout = 60,
) -> None:
    """Move a port to another host, under traffic.

    All that lives on it comes along, networks that it carries too, and connections go on. It ends when the port lives
    there and nowhere else; where the new machine cannot have it, it stays where it was.
    """
    from nestnet.cli import changes

    changes.move(path, to, lab, wait, timeout)


@app.command()
def detach(
    path: Annotated[str, typer.Argument(metavar="PORT", help="A port like acme/web1, or its id.")],
    lab: Lab = None,
    wait: Wait = True,
    timeout: Timeout = 60,
) -> None:
    """Take a port's workload off what it hangs on.

    A namespace stays, without our interface; so does a tap that nestnet did not make. In a lab the port gets a
    namespace of its own again.
    """
    from nestnet.cli import changes

    changes.attach(path, {}, lab, wait, timeout)


@app.command("exec", context_settings=PASSED_ON)
def exec_(
    where: Where,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD", help="The command and its arguments.")],
    lab: Lab = None,
) -> None:
    """Run a command in a workload or machine.

    Its stdin, signals and exit status are its own.
    """
    from nestnet.cli import packets

    packets.exec(where, command, lab)


@app.command()
def bench(
    rows: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Rows of docs/performance.md; all.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Windows of each path; each row has its number.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute: right or wrong, no figures that count.")] = False,
    folder: Annotated[
        str | None, typer.Option("--folder", metavar="FOLDER", help="For raw samples and the page; else only shown.")
    ] = None,
) -> None:
    """Measure it beside its limit and its peers.

    Makes namespaces and labs of its own, and takes them away again. Exit 1 when something is missed or void.
    """
    given = [*(["--rounds", str(rounds)] if rounds else []), *(["--quick"] if quick else [])]
    given += ["--folder", folder] if folder else []
    os.execv(sys.executable, [sys.executable, "-m", "nestnet.bench", *given, *(rows or [])])


@app.command("test")
def check(
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="Else the lab's own file.")] = None,
    lab: Lab = None,
    output: Output = Format.table,
) -> None:
    """Prove the checks of a file with packets.

    Each check sends a packet that nobody else sends. allow: the workload of `to` saw it. deny: it had not after
    2 s. Exit 4 when one fails, with the reason.
    """
    from nestnet.cli import packets

    if not packets.test(file, lab, output):
        sys.exit(4)


@app.command()
def trace(
    port: Annotated[str, typer.Argument(metavar="PORT", help="The port that sends, like acme/web1.")],
    to: Annotated[str, typer.Argument(metavar="DST", help="An address, or a port like acme/db1.")],
    tcp: Annotated[
        int | None, typer.Option("--tcp", metavar="PORT", min=1, max=65535, help="TCP to this port.")
    ] = None,
    udp: Annotated[
        int | None, typer.Option("--udp", metavar="PORT", min=1, max=65535, help="UDP to this port.")
    ] = None,
    icmp: Annotated[bool, typer.Option("--icmp", help="An echo request; so it is when nothing is said.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Send one now, too, and show where it went.")] = False,
    lab: Lab = None,
    output: Output = Format.table,
) -> None:
    """Tell what happens to a packet, layer by layer.

    From the rules that machines run: each level's decision, and the bytes on the wire.
    """
    from nestnet.cli import views

    if (tcp is not None) + (udp is not None) + icmp > 1:
        raise typer.BadParameter("choose one of --tcp, --udp and --icmp")
    protocol = "tcp" if tcp is not None else "udp" if udp is not None else "icmp"
    views.trace(port, to, protocol, tcp or udp, live, lab, output)


@app.command()
def capture(
    where: Where,
    filter: Annotated[list[str] | None, typer.Argument(metavar="FILTER", help="As tcpdump reads it.")] = None,
    write: Annotated[
        str | None, typer.Option("--write", "-w", metavar="FILE", help="Write packets; - for stdout.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", "-c", min=1, help="End after so many packets.")] = None,
    lab: Lab = None,
) -> None:
    """Show the packets of a workload or machine.

    With tcpdump; the equivalent command goes to stderr.
    """
    from nestnet.cli import packets

    packets.capture(where, filter or [], write, count, lab)


app.add_typer(importing, name="import")


@importing.command("topology")
def import_topology(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A graph; - for stdin.")],
    machines: Annotated[
        int, typer.Option("--machines", metavar="N", min=1, max=1000, help="Spread the ports over so many.")
    ] = 3,
) -> None:
    """Print the network file of a graph.

    FILE is node-link JSON or GraphML. Each node becomes a router with a segment and a port, each edge a link of the
    cost `dist`. What had to be left out goes to stderr.
    """
    from nestnet.cli import imports

    imports.topology(file, machines)


@app.command()
def status(lab: Lab = None, output: Output = Format.table) -> None:
    """Say whether all is well.

    First the verdict, then the machines, then what they dropped and why. Exit 1 when something is wrong.
    """
    from nestnet.cli import views

    if not views.status(lab, output):
        sys.exit(1)


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is to come.")] = False,
    last: Annotated[int, typer.Option("--last", min=0, max=1000, metavar="N", help="Begin so many back.")] = 20,
    lab: Lab = None,
    output: Output = Format.table,
) -> None:
    """Show who changed what, and what happened.

    Oldest first. `-o json` prints one object a line.
    """
    from nestnet.cli import operating

    operating.events(follow, last, lab, output)


@app.command()
def logs(
    of: Annotated[
        str | None, typer.Argument(metavar="MACHINE", help="Only its agent's; `controller`: only that one's.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is to come.")] = False,
    last: Annotated[int, typer.Option("--last", min=0, metavar="N", help="Begin so many lines back.")] = 20,
    lab: Lab = None,
) -> None:
    """Show what controller and agents of a lab say."""
    from nestnet.cli import operating

    operating.logs(of, follow, last, lab)


@app.command()
def doctor(lab: Lab = None, output: Output = Format.table) -> None:
    """Look for what is wrong here, and say how to mend it.

    The kernel, this computer's settings, leftovers, the controller, the agents and their programs. Exit 1 when
    something is wrong.
    """
    from nestnet.cli import doctors

    if not doctors.doctor(lab, output):
        sys.exit(1)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; must not be there.")],
    lab: Lab = None,
) -> None:
    """Write the whole store to a file.

    It has the store's keys: keep it as secret as the store.
    """
    from nestnet.cli import operating

    operating.backup(file, lab)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup` wrote.")],
    force: Annotated[
        bool, typer.Option("--force", help="Machines may remove at once what FILE does not have.")
    ] = False,
    lab: Lab = None,
) -> None:
    """Put the store back to what a backup has.

    A machine that would lose many ports holds that back until `confirm`; its traffic goes on.
    """
    from nestnet.cli import operating

    operating.restore(file, force, lab)


@app.command()
def confirm(lab: Lab = None) -> None:
    """Let machines remove what a restored store lacks."""
    from nestnet.cli import operating

    operating.confirm(lab)


@app.command()
def version() -> None:
    """Print the version."""
    from nestnet import __version__

    print(f"nestnet {__version__}")


app.add_typer(tenants, name="tenant")

Tenant = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]
Networks = Annotated[str | None, typer.Option("--networks", metavar="N|none", help="How many networks it may have.")]
Segments = Annotated[str | None, typer.Option("--segments", metavar="N|none", help="How many segments.")]
Ports = Annotated[str | None, typer.Option("--ports", metavar="N|none", help="How many ports.")]
TotalRate = Annotated[
    str | None, typer.Option("--rate", metavar="RATE|none", help="What all ports may send together, as 10gbit.")
]


def _limits(networks: str | None, segments: str | None, ports: str | None, rate: str | None) -> dict[str, str | None]:
    return {"networks": networks, "segments": segments, "ports": ports, "rate": rate}


@tenants.command("create")
def make_tenant(
    name: Annotated[str, typer.Argument(metavar="NAME", help="PARENT-SOMETHING; the operator may choose any.")],
    parent: Annotated[
        str | None, typer.Option("--parent", metavar="TENANT", help="The tenant that it is below; else your own.")
    ] = None,
    networks: Networks = None,
    segments: Segments = None,
    ports: Ports = None,
    rate: TotalRate = None,
    lab: Lab = None,
) -> None:
    """Make a tenant below one of yours.

    What it may have is reserved from its parent's. A limit that is not given is that of the tenants above.
    """
    from nestnet.cli import identities

    identities.make_tenant(name, parent, _limits(networks, segments, ports, rate), lab)


@tenants.command("set")
def set_tenant(
    name: Tenant,
    networks: Networks = None,
    segments: Segments = None,
    ports: Ports = None,
    rate: TotalRate = None,
    lab: Lab = None,
) -> None:
    """Give a tenant below yours other limits.

    Those that are not given stay; `none` takes one away. Less than it has is refused.
    """
    from nestnet.cli import identities

    identities.set_tenant(name, _limits(networks, segments, ports, rate), lab)


@tenants.command("suspend")
def suspend(name: Tenant, lab: Lab = None) -> None:
    """Let a tenant's tokens read, and change nothing.

    So it is for all tenants below it. Their networks go on.
    """
    from nestnet.cli import identities

    identities.suspend(name, True, lab)


@tenants.command("resume")
def resume(name: Tenant, lab: Lab = None) -> None:
    """Let a suspended tenant change things again."""
    from nestnet.cli import identities

    identities.suspend(name, False, lab)


app.add_typer(tokens, name="token")


@tokens.command("create")
def make_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the audit log will call its holder.")],
    tenants: Annotated[
        list[str] | None,
        typer.Option("--tenant", metavar="TENANT[=ROLE]", help="For this tenant; owner or reader. May be repeated."),
    ] = None,
    operator: Annotated[bool, typer.Option("--operator", help="For everything.")] = False,
    reader: Annotated[bool, typer.Option("--reader", help="For reading everything.")] = False,
    ttl: Annotated[str | None, typer.Option("--ttl", metavar="TIME", help="How long it counts, as 90d or 12h.")] = None,
    lab: Lab = None,
) -> None:
    """Make a token, and print it.

    It is for the tenants that are named, and for nothing else. It is told only once.
    """
    from nestnet.cli import identities

    identities.make_token(name, tenants or [], operator, reader, ttl, lab)


@tokens.command("join")
def join_token(
    machine: Annotated[str, typer.Argument(metavar="MACHINE", help="The name that the machine will have.")],
    ttl: Annotated[str, typer.Option("--ttl", metavar="TIME", help="How long it counts, as 30m or 12h.")] = "1h",
    lab: Lab = None,
) -> None:
    """Make a token that lets one machine join, once, and print it.

    For a machine that has joined before it is how it comes back: certificates that it had count no more.
    """
    from nestnet.cli import identities

    identities.let_join(machine, ttl, lab)


@app.command()
def join(
    url: Annotated[str, typer.Argument(metavar="URL", help="The controller: https://HOST:PORT or unix:PATH.")],
    machine: Annotated[str, typer.Option("--machine", metavar="NAME", help="The name that the token is for.")],
    address: Annotated[str, typer.Option("--address", metavar="ADDRESS", help="Its address in the underlay.")],
    token_file: TokenFile = None,
    nic: Annotated[
        list[str] | None, typer.Option("--nic", metavar="NAME", help="Its NICs there; else the one with the address.")
    ] = None,
    mtu: Annotated[int, typer.Option("--mtu", metavar="BYTES", help="Of those.")] = 1500,
    vlan: Annotated[
        int | None, typer.Option("--vlan", metavar="ID", help="The VLAN that all of them are in.", min=1, max=4094)
    ] = None,
    trunk: Annotated[
        list[str] | None,
        typer.Option("--trunk", metavar="NETWORK=NIC", help="A physical network, and the NIC that leads there."),
    ] = None,
    state: Annotated[
        Path, typer.Option("--state", metavar="FOLDER", help="Where its key and certificate are kept.")
    ] = Path("/var/lib/nestnet-agent"),
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="Where to write down how its agent starts.")
    ] = Path("/etc/nestnet/agent.toml"),
) -> None:
    """Make this computer a machine.

    Its key is made here and stays here. The controller's authority signs it, if the token is the machine's.
    """
    from nestnet.cli import identities, processes

    token = identities.read_token(token_file)
    if token is None:
        raise typer.BadParameter(f"give --token-file, or set {identities.TOKEN}")
    spec = {"name": machine, "address": address, "mtu": mtu, "nics": nic or []}
    spec |= {"vlan": {"id": vlan}} if vlan is not None else {}
    spec |= {"trunks": identities.trunks(trunk)} if trunk else {}
    processes.join(url, token, spec, state)
    identities.told_of_join(machine, url, state, config)


@app.command()
def fence(
    machine: Annotated[str, typer.Argument(metavar="MACHINE", help="A machine like m1, or its id.")],
    lift: Annotated[bool, typer.Option("--lift", help="Let it in again.")] = False,
    lab: Lab = None,
    wait: Wait = True,
    timeout: Timeout = 60,
) -> None:
    """Shut a machine out.

    To all others it is a stranger within seconds, whatever it still says and sends, and the controller does not listen
    to it. What lives on it stays as it is stored, and is unreachable.
    """
    from nestnet.cli import identities

    identities.fence(machine, not lift, lab, wait, timeout)


OfNetwork = Annotated[
    str | None, typer.Option("--network", metavar="PATH", help="Whose host ports; else the machines, the operator's.")
]
HostNames = Annotated[
    list[str] | None, typer.Option("--host", metavar="NAME", help="This one, not all. May be repeated.")
]


@app.command()
def grant(
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="A tenant below yours; invite others.")],
    network: OfNetwork = None,
    host: HostNames = None,
    networks: Networks = None,
    segments: Segments = None,
    ports: Ports = None,
    rate: TotalRate = None,
    lab: Lab = None,
) -> None:
    """Let a tenant's networks be carried by hosts of yours.

    What it may have of each is reserved from yours. Granted already, these hosts and limits count from now on.
    """
    from nestnet.cli import granting

    granting.grant(tenant, network, host or [], _limits(networks, segments, ports, rate), lab)


@app.command()
def invite(
    network: OfNetwork = None,
    host: HostNames = None,
    networks: Networks = None,
    segments: Segments = None,
    ports: Ports = None,
    rate: TotalRate = None,
    ttl: Annotated[str, typer.Option("--ttl", metavar="TIME", help="How long it counts, as 12h or 30d.")] = "7d",
    lab: Lab = None,
) -> None:
    """Make an invitation to hosts of yours, and print it.

    Whoever redeems it first has them. It is told only once.
    """
    from nestnet.cli import granting

    granting.invite(network, host or [], _limits(networks, segments, ports, rate), ttl, lab)


@app.command()
def redeem(
    invitation_file: Annotated[
        str | None,
        typer.Option(
            "--invitation-file", metavar="FILE", help="Where the invitation is; - for stdin; or NESTNET_INVITATION."
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="For which of yours.")] = None,
    lab: Lab = None,
) -> None:
    """Take the hosts that an invitation offers."""
    from nestnet.cli import granting

    granting.redeem(invitation_file, tenant, lab)


@app.command()
def revoke(
    grant: Annotated[str, typer.Argument(metavar="GRANT", help="Its id, from `nestnet get grants`.")],
    suspend: Annotated[bool, typer.Option("--suspend", help="Carry nothing new, only.")] = False,
    cut: Annotated[bool, typer.Option("--cut", help="Close what it carries, only.")] = False,
    cascade: Annotated[bool, typer.Option("--cascade", help="Cut it now, and delete all of it after --grace.")] = False,
    lift: Annotated[bool, typer.Option("--lift", help="Open it again.")] = False,
    grace: Annotated[str, typer.Option("--grace", metavar="TIME", help="How long, as 30m or 24h.")] = "24h",
    lab: Lab = None,
) -> None:
    """Take granted hosts back.

    Refused while they carry networks, unless told what becomes of these.
    """
    from nestnet.cli import granting

    granting.revoke(grant, suspend, cut, cascade, lift, grace, lab)


app.add_typer(contexts, name="context")


@contexts.command("add")
def add_context(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    url: Annotated[str, typer.Option("--controller", metavar="URL", help="https://HOST:PORT or unix:PATH.")],
    token_file: TokenFile = None,
) -> None:
    """Keep a controller under a name, and mean it from now on.

    Over TLS it must be the one that the token is from.
    """
    from nestnet.cli import identities

    identities.add_context(name, url, token_file)


@contexts.command("use")
def use_context(name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]) -> None:
    """Mean this controller from now on."""
    from nestnet.cli import identities

    identities.use_context(name)


@contexts.command("list")
def list_contexts(output: Output = Format.table) -> None:
    """Show the controllers that are kept; * is the one that is meant."""
    from nestnet.cli import identities

    identities.list_contexts(output)


@contexts.command("remove")
def remove_context(name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]) -> None:
    """Forget a controller."""
    from nestnet.cli import identities

    identities.remove_context(name)


Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Else the one in /etc/nestnet.")]


@app.command()
def controller(
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="URL", help="unix:PATH, https://ADDRESS:PORT or http://127.0.0.1:PORT."),
    ] = None,
    state: Annotated[str | None, typer.Option("--state", metavar="FOLDER", help="Where the store is kept.")] = None,
    config: Config = None,
) -> None:
    """Process: hold what should be, and serve the API.

    Options count more than its file, /etc/nestnet/controller.toml.
    """
    from nestnet.cli import processes, settings

    options = {"listen": tuple(listen or ()), "state": state}
    processes.controller(settings.read(settings.ControllerSettings, config, options))


@app.command()
def agent(
    machine: Annotated[str | None, typer.Option("--machine", metavar="NAME", help="Which machine this is.")] = None,
    controller: Annotated[str | None, typer.Option("--controller", metavar="URL", help="Its controller.")] = None,
    pins: Annotated[
        str | None, typer.Option("--pins", metavar="FOLDER", help="In bpffs: for programs, maps and links.")
    ] = None,
    workloads: Annotated[
        str | None,
        typer.Option("--workloads", metavar="PREFIX", help="Make a namespace of this name for each local port."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="URL", help="Answer /metrics: unix:PATH or http://127.0.0.1:PORT."),
    ] = None,
    state: Annotated[
        str | None, typer.Option("--state", metavar="FOLDER", help="Where `join` put its key and certificate.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="On a port: join first, unless it has joined.")
    ] = None,
    guests: Annotated[
        str | None,
        typer.Option("--guests", metavar="FOLDER", help="Run agents in those of these namespaces that are hosts."),
    ] = None,
    relay: Annotated[
        str | None,
        typer.Option("--relay", metavar="URL", help="Where agents in workloads find the controller, if not there."),
    ] = None,
    config: Config = None,
) -> None:
    """Process: make one machine so.

    It runs in the network namespace of its machine. Options count more than its file, /etc/nestnet/agent.toml.
    """
    from nestnet.cli import identities, processes, settings

    options = {
        "machine": machine,
        "controller": controller,
        "pins": pins,
        "workloads": workloads,
        "metrics": metrics,
        "state": state,
        "guests": guests,
        "relay": relay,
    }
    token = identities.read_token(str(token_file)) if token_file is not None else None
    processes.agent(settings.read(settings.AgentSettings, config, options), token)
