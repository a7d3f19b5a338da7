"""A virtual machine on a tap: qemu, without KVM, a kernel of Debian's, and of this computer's files those that are
named.

    build/vm       kernel and modules (scripts/install)
    an archive     made here: init, modules, programs with their libraries, Python with what it imports; all in memory
    ttyS0          the log
    vport          lines for a shell, which `run` types, and what they print
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from golden_files import ROOT

from nestnet.agent import netns

KERNEL = ROOT / "build/vm"
# Each after those that it needs.
MODULES = "virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover virtio_net"
MODULES += " virtio_console udp_tunnel ip6_udp_tunnel vxlan"
BOOT = 60.0  # seconds until the shell is there
ANSWER = 30.0  # seconds for a command
INIT = """#!/bin/busybox sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin {environment}
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module.ko; done
ip link set lo up
ip link set eth0 up
until port=$(ls /dev/vport*); do usleep 1000; done
exec 3<>$port
echo ready >&3
while read -r line <&3; do (eval "$line") </dev/null >&3 2>&3; echo "=$?=" >&3; done
"""
# What a client's script does at the least, for busybox's.
DHCP = """#!/bin/sh
[ "$1" != bound ] || { ip addr replace $ip/$mask dev $interface && ip link set $interface mtu $mtu; }
"""
# Prints what Python reads for a module.
WATCHED = """
import sys
read = []
sys.addaudithook(lambda event, told: read.append(told[0]) if event == "open" else None)
import {module}
{used}
for one in list(sys.modules.values()):
    read += [getattr(one, "__file__", None), getattr(one, "__cached__", None)]
print(*read, sep="\\n")
"""


def read_by(module: str, used: str) -> list[str]:
    """The files of a module of tests/, of all that it imports, and what else they read; `used` is run, too: some is
    imported when it is first used."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    program = WATCHED.format(module=module, used=used)
    told = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    return sorted({line for line in told.splitlines() if not line.startswith("/proc") and Path(line).is_file()})


def libraries(files: Iterable[str]) -> list[str]:
    """Those that programs and libraries are linked with."""
    told = subprocess.run(["ldd", *files], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return sorted(set(re.findall(r"(/\S+) \(0x", told.stdout)))


def archive(target: Path, contents: Mapping[str, bytes], files: Iterable[str]) -> None:
    """An initramfs of contents by path, executable, and of files of this computer, at their places."""
    folders: set[str] = set()
    with target.open("wb") as out:

        def write(name: str, mode: int, data: bytes, mtime: int = 0) -> None:
            # "newc", of the kernel's driver-api/early-userspace/buffer-format
            fields = (0, mode, 0, 0, 1, mtime, len(data), 0, 0, 0, 0, len(name) + 1, 0)
            head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
            out.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

        def make_folders(name: str) -> None:
            for folder in reversed(Path(name).parents[:-1]):
                if str(folder) not in folders:
                    folders.add(str(folder))
                    write(str(folder), 0o040755, b"")

        for folder in ("proc", "sys", "dev", "tmp", "bin", "run"):
            make_folders(f"{folder}/x")
        for path in sorted(set(files)):
            make_folders(path[1:])
            write(path[1:], 0o100755, Path(path).read_bytes(), int(Path(path).stat().st_mtime))
        for path, data in contents.items():
            make_folders(path[1:])
            write(path[1:], 0o100755, data)
        write("TRAILER!!!", 0, b"")


def programs(*names: str) -> Iterator[str]:
    for name in names:
        found = shutil.which(name)
        assert found is not None, f"{name} is not installed: scripts/install"
        yield found


class VM:
    """Runs on a tap of `machine`, with the MAC of the tap's port, until it is closed. In it are Python and `script`, a
    module of tests/, with all that it imports and is `used` of that, and `more` files by path."""

    def __init__(
        self, machine: Path, tap: str, mac: str, folder: Path, script: str, used: str, more: Mapping[str, bytes]
    ) -> None:
        assert KERNEL.exists(), f"{KERNEL} is not there: scripts/install"
        self._folder, self.log = folder, folder / "console"
        python = Path(sys.executable).resolve()
        own = [*programs("ip", "bridge", "ping", "busybox"), str(python), *read_by(script, used)]
        landmarks = [f"{sys.base_prefix}/lib/python3.{sys.version_info.minor}/os.py"]
        paths = [str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if path.endswith("site-packages"))]
        environment = f"PYTHONPATH={':'.join(paths)} PYTHON={python}"
        contents = {
            **more,
            "/init": INIT.format(modules=MODULES, environment=environment).encode(),
            "/dhcp": DHCP.encode(),
            "/bin/busybox": Path(next(programs("busybox"))).read_bytes(),
            **{f"/modules/{name}.ko": (KERNEL / f"{name}.ko").read_bytes() for name in MODULES.split()},
        }
        archive(folder / "initramfs", contents, [*own, *landmarks, *libraries(own)])
        # It computes all the time, and other tests measure pauses meanwhile.
        command = ["nice", "-n", "19"]
        command += ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "320", "-nodefaults", "-no-reboot"]
        command += ["-display", "none", "-serial", f"file:{self.log}"]
        command += ["-chardev", "stdio,id=shell", "-device", "virtio-serial-pci"]
        command += ["-device", "virtserialport,chardev=shell"]
        command += ["-kernel", str(KERNEL / "vmlinuz"), "-initrd", str(folder / "initramfs")]
        command += ["-append", "console=ttyS0 panic=-1 quiet"]
        command += ["-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no"]
        command += ["-device", f"virtio-net-pci,netdev=n0,mac={mac},romfile="]
        pipe = subprocess.PIPE
        start = partial(subprocess.Popen, command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, bufsize=0)
        self._process: subprocess.Popen[bytes] = netns.run_in(machine, start)
        self._heard = b""

    def close(self) -> None:
        with self._process:
            self._process.kill()
        (self._folder / "initramfs").unlink()

    def wait(self) -> None:
        """For the shell."""
        self._until(rb"ready\n", BOOT)

    def run(self, command: str, timeout: float = ANSWER) -> str:
        """What a command of the shell in there prints. AssertionError if it fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        heard, status = self._until(rb"=(\d+)=\n", timeout)
        assert status == b"0", (command, heard, self.log.read_text(errors="replace"))
        return heard

    def _until(self, pattern: bytes, timeout: float) -> tuple[str, bytes]:
        """What came before it, and its group."""
        assert self._process.stdout is not None
        limit = time.monotonic() + timeout
        while (found := re.search(pattern, self._heard)) is None:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, limit - time.monotonic()))
            data = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            assert data, (pattern, self._heard, self.log.read_text(errors="replace") if self.log.exists() else "")
            self._heard += data
        before, self._heard = self._heard[: found.start()].decode(), self._heard[found.end() :]
        return before, found[1] if found.re.groups else b""
