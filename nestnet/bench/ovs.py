"""Open vSwitch as a peer, in its userspace datapath: the kernel's is not everywhere.

    machine 1                                       machine 2
    br0: workload, vxlan                            br0: workload, vxlan
    br-phy: eth0, 192.0.2.1        - wire -         br-phy: eth0, 192.0.2.2

A switch for each machine, with a database of its own. Its ports are packet sockets, which have to be given whole
packets with checksums, so workloads and NICs have no offloads. That is the best of its modes here: with
`userspace-tso-enable` it refuses to wrap what has offloads, and with AF_XDP each switch has a thread that never sleeps,
so that on two CPUs every packet waits for the turn of the next.

Look while it runs: `ovs-vsctl --db unix:FOLDER/1/db.sock show`; FOLDER is in what `ps` shows of ovsdb-server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nestnet.agent import netns
from nestnet.bench.beds import MTU, PREFIX, cleaned, ip, machines, plug, run
from nestnet.bench.traffic import Bed, Place

OFF = ("tx", "off", "tso", "off", "gso", "off", "gro", "off")
SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
NEEDED = ("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ethtool")


def within(namespace: str, *command: str) -> None:
    netns.run_in(netns.path(namespace), partial(run, *command))


@contextlib.contextmanager
def switch(namespace: str, folder: Path) -> Iterator[None]:
    """The daemons of a machine, in its namespace."""
    folder.mkdir()
    run("ovsdb-tool", "create", str(folder / "conf.db"), SCHEMA)
    database = f"unix:{folder / 'db.sock'}"
    environment = {**os.environ, "OVS_RUNDIR": str(folder), "OVS_LOGDIR": str(folder)}
    commands = (
        ["ovsdb-server", str(folder / "conf.db"), f"--remote=p{database}", f"--pidfile={folder / 'db.pid'}"],
        ["ovs-vswitchd", database, f"--pidfile={folder / 'switch.pid'}"],
    )
    pids = []
    try:
        for command, name in zip(commands, ("db", "switch"), strict=True):
            words = [*command, "--detach", "--no-chdir", f"--log-file={folder / name}.log"]
            start = partial(subprocess.run, words, check=True, env=environment, capture_output=True)
            netns.run_in(netns.path(namespace), start)
            pids.append(int((folder / f"{name}.pid").read_text()))
        yield
    finally:
        for pid in reversed(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def ovs() -> Iterator[Bed]:
    """Two machines with a switch each. RuntimeError where Open vSwitch is not installed."""
    if lacking := [name for name in NEEDED if shutil.which(name) is None]:
        raise RuntimeError(f"there is no {lacking[0]}: `apt-get install openvswitch-switch ethtool`")
    prefix = f"{PREFIX}ovs-"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(cleaned(prefix))
        names = (prefix + "m1", prefix + "m2")
        machines(prefix + "wire", names, 1500)
        for number, (name, workload) in enumerate(zip(names, ("a", "b"), strict=True), 1):
            place, inside = folder / str(number), prefix + workload
            command = partial(run, "ovs-vsctl", f"--db=unix:{place / 'db.sock'}")
            netns.create(inside)
            ip(
                "-n", name, "link", "add", "bridge0", "type", "bridge"
            )  # `plug` wants one; the switch takes its port over
            plug(inside, name, "bridge0", workload, MTU, f"10.7.0.{number + 1}")
            ip("-n", name, "link", "delete", "bridge0")
            ip("-n", name, "address", "flush", "dev", "eth0")
            for where, device in ((name, "eth0"), (name, workload), (inside, "eth0"), (prefix + "wire", f"m{number}")):
                within(where, "ethtool", "-K", device, *OFF)
            stack.enter_context(switch(name, place))
            for bridge, device in (("br-phy", "eth0"), ("br0", workload)):
                command("add-br", bridge, "--", "set", "bridge", bridge, "datapath_type=netdev")
                command("add-port", bridge, device)
            far = ("type=vxlan", f"options:remote_ip=192.0.2.{3 - number}", "options:key=100")
            command("add-port", "br0", "vxlan", "--", "set", "interface", "vxlan", *far)
            ip("-n", name, "address", "add", f"192.0.2.{number}/24", "dev", "br-phy")
            ip("-n", name, "link", "set", "br-phy", "up")
            ip("-n", name, "link", "set", "br0", "up")

        first, second = (Place(netns.path(prefix + name), f"10.7.0.{n}") for name, n in (("a", 2), ("b", 3)))
        yield Bed(first, second, None)
