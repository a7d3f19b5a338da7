"""A workload's end of a trunk where Linux has no VLAN interfaces: two programs of a few instructions on its interface.

One puts tags on all that leaves, one takes off as many of what comes. Offloads stay as they are."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nestnet.agent import netns

BPF = 321  # the system call, x86-64
PROG_LOAD, LINK_CREATE = 5, 28  # <linux/bpf.h>
SCHED_CLS, TCX_INGRESS, TCX_EGRESS = 3, 46, 47
VLAN_PUSH, VLAN_POP = 18, 19
NEXT = -1
Q, AD = 0x8100, 0x88A8  # 802.1Q, 802.1ad


def _instruction(opcode: int, registers: int, value: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, registers, 0, value)


def _program(calls: Sequence[tuple[int, int, int]]) -> bytes:
    """Calls of helpers with the packet and two numbers; then on to the next program."""
    code = _instruction(0xBF, 0x16)  # r6 = r1
    for helper, second, third in calls:
        code += _instruction(0xBF, 0x61) + _instruction(0xB7, 2, second) + _instruction(0xB7, 3, third)
        code += _instruction(0x85, 0, helper)
    return code + _instruction(0xB7, 0, NEXT) + _instruction(0x95, 0)


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(BPF, command, ctypes.create_string_buffer(attributes, 160), 160)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"bpf({command})")
    return int(found)


def _attach(code: bytes, ifindex: int, hook: int) -> int:
    """The descriptor of the link that keeps the program there."""
    instructions, license = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    where = ctypes.addressof(instructions), ctypes.addressof(license)
    program = _bpf(PROG_LOAD, struct.pack("<IIQQ", SCHED_CLS, len(code) // 8, *where))
    try:
        return _bpf(LINK_CREATE, struct.pack("<IIII", program, ifindex, hook, 0))
    finally:
        os.close(program)


@contextmanager
def behind(namespace: Path, *tags: tuple[int, int], interface: str = "eth0") -> Iterator[None]:
    """All that an interface sends bears these tags meanwhile, (EtherType, id) from the outermost to the innermost, and
    what it is sent loses as many."""

    def attach() -> list[int]:
        ifindex = socket.if_nametoindex(interface)
        push = [(VLAN_PUSH, socket.htons(kind), id) for kind, id in reversed(tags)]
        return [
            _attach(_program(push), ifindex, TCX_EGRESS),
            _attach(_program([(VLAN_POP, 0, 0)] * len(tags)), ifindex, TCX_INGRESS),
        ]

    links = netns.run_in(namespace, partial(attach))
    try:
        yield
    finally:
        for link in links:
            os.close(link)
