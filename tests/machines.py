"""What hangs on a tap as a virtual machine does, without one: its network card in a namespace of its own.

machine                     guest
  tap  <--- this thread --->  nic     frames with their virtio headers, so offloads work as with qemu
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import subprocess
import threading
from functools import partial
from pathlib import Path

from nestnet.agent import links, netns

TUNSETOFFLOAD, CSUM, TSO4, TSO6 = 0x400454D0, 1, 2, 4  # <linux/if_tun.h>
VNET_HDR = 0x4000
LONGEST = 1 << 17


def open_tap(name: str, offloads: bool) -> int:
    """In the calling thread's namespace; made if it is not there, and gone with the descriptor then."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    flags = links.IFF_TAP | links.IFF_NO_PI | (VNET_HDR if offloads else 0)
    fcntl.ioctl(tun, links.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(tun, TUNSETOFFLOAD, CSUM | TSO4 | TSO6 if offloads else 0)
    return tun


class Guest:
    """A card called nic, in a namespace that is made for it, on the other side of a tap of a machine."""

    def __init__(self, name: str, machine: Path, tap: str, mac: str, offloads: bool = True) -> None:
        self.room = netns.create(name)
        self._name = name
        self._taps = [
            netns.run_in(machine, partial(open_tap, tap, offloads)),
            netns.run_in(self.room, partial(open_tap, "nic", offloads)),
        ]
        for command in (
            ["sysctl", "-qw", "net.ipv6.conf.nic.accept_ra=2"],
            ["ip", "link", "set", "lo", "up"],
            ["ip", "link", "set", "nic", "address", mac, "up"],
        ):
            self.run(*command)
        self._end, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def run(self, *command: str) -> str:
        """What a command inside prints. CalledProcessError if it fails."""
        work = partial(subprocess.run, command, capture_output=True, text=True, check=True, timeout=30)
        return str(netns.run_in(self.room, work).stdout)

    def close(self) -> None:
        os.write(self._wake, b".")
        self._thread.join()
        for descriptor in (*self._taps, self._end, self._wake):
            os.close(descriptor)
        netns.kill_inside([self.room])
        netns.delete(self._name)

    def _copy(self) -> None:
        others = dict(zip(self._taps, reversed(self._taps), strict=True))
        while True:
            ready, _, _ = select.select([*others, self._end], [], [])
            if self._end in ready:
                return
            for tap in ready:
                for _ in range(64):
                    try:
                        frame = os.read(tap, LONGEST)
                    except BlockingIOError:
                        break
                    with contextlib.suppress(OSError):  # that side is down, or full: lost, as on a wire
                        os.write(others[tap], frame)
