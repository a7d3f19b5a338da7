"""Hears from the kernel what happens to links here and in the workloads' namespaces: whatever others do is told.

One netlink socket hears of the machine's namespace and of every other that this one has a number for (`nsid`): those
that the other ends of our veth pairs are in. So ten thousand namespaces are watched without looking into any. Whoever
has root in one of them may cause as many messages as he likes: they are read when there is a turn, and when there were
more than the socket holds, or than one turn reads, all is to be looked at.

From a shell: `ip monitor all-nsid link address route netconf`.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

ROOM = 1 << 22  # bytes of messages that wait for the next turn
READ, LEFT = 5000, 20000  # messages that are read in one turn, and of those behind them that are thrown away

SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NETLINK_LISTEN_ALL_NSID = 270, 1, 8  # <linux/netlink.h>
SO_RCVBUFFORCE = 33
# <linux/rtnetlink.h>: links, addresses and routes of IPv4 and IPv6, and their settings (forwarding, rp_filter)
GROUPS = (1, 5, 7, 9, 11, 24, 25)
LINK, ADDRESS, NETCONF = (16, 17), (20, 21), (80, 81)  # RTM_NEW and RTM_DEL of each
NETCONFA_IFINDEX = 1


class Heard(NamedTuple):
    """What something happened to: links here by ifindex, and other namespaces by the number they have here.
    `everything`: more than could be heard."""

    links: frozenset[int] = frozenset()
    namespaces: frozenset[int] = frozenset()
    everything: bool = False

    def __bool__(self) -> bool:
        return bool(self.links or self.namespaces or self.everything)


class Monitor:
    """Hears from now on, in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_LISTEN_ALL_NSID, 1)
        for group in GROUPS:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def take(self) -> Heard:
        """What has happened since the last time."""
        links: set[int] = set()
        namespaces: set[int] = set()
        for _ in range(READ):
            try:
                data, extra, _, _ = self._socket.recvmsg(1 << 16, 64)
            except BlockingIOError:
                return Heard(frozenset(links), frozenset(namespaces))
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                break
            for level, kind, number in extra:
                if (level, kind) == (SOL_NETLINK, NETLINK_LISTEN_ALL_NSID):
                    namespaces.add(struct.unpack("=i", number)[0])
                    break
            else:
                links.update(_links(data))
        # What is left is as good as heard. There may be no end of it.
        for _ in range(LEFT):
            try:
                self._socket.recv(1)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
        return Heard(everything=True)


def _links(data: bytes) -> set[int]:
    """The ifindexes that netlink messages of this namespace are about."""
    found = set()
    at = 0
    while at + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, at)
        if length < 16:
            break
        if kind in LINK or kind in ADDRESS:
            # struct ifinfomsg: family, type, index; struct ifaddrmsg: family, length, flags, scope, index
            found.add(struct.unpack_from("=i", data, at + 20)[0])
        elif kind in NETCONF:
            # struct netconfmsg: family, padded to 4 bytes; the first attribute says of which
            size, what, index = struct.unpack_from("=HHi", data, at + 20)
            if (size, what) == (8, NETCONFA_IFINDEX) and index > 0:  # else of all, or of those to come
                found.add(index)
        at += (length + 3) & ~3
    return found
