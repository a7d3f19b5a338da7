"""Reads BTF, the description of C types that the compiler puts into an object, as numpy dtypes.

A C struct is the dtype with the same fields at the same offsets, so "do Python and C mean the same bytes?" is a
comparison of two dtypes. Look at an object's with `bpftool btf dump file build/nestnet-HASH.bpf.o`.

    header | types: one after another, numbered from 1 | strings

Only what tables can be made of is understood: integers, enums, arrays, structs, unions, pointers and their names.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np

MAGIC = 0xEB9F

# Kinds, <linux/btf.h>
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)

# Bytes behind the three words that each type begins with: so many, and so many for each of its members.
TAIL = {INT: (4, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FUNC_PROTO: (0, 8)} | {
    VAR: (4, 0),
    DATASEC: (0, 12),
    DECL_TAG: (4, 0),
    ENUM64: (0, 12),
}

Dtype = np.dtype[np.void] | np.dtype[np.generic]


@dataclass(frozen=True)
class Type:
    """One type as it stands in BTF. `size` is bytes, or the number of the type that it refers to."""

    kind: int
    name: str
    size: int
    bitfields: bool
    members: tuple[tuple[str, int, int], ...] = ()  # name, type, offset: bits in a struct, bytes in a section
    element: int = 0
    count: int = 0


@dataclass(frozen=True)
class Btf:
    """All types of an object. Number 0 is void."""

    types: list[Type] = field(default_factory=list)

    @classmethod
    def parse(cls, raw: bytes) -> Btf:
        """Raises ValueError if this is no BTF of this machine's byte order, or has kinds that are not known."""
        magic, _, _, start, types_at, types_size, strings_at, _ = struct.unpack_from("<HBBIIIII", raw)
        if magic != MAGIC:
            raise ValueError("no BTF, or of the other byte order")

        def text(offset: int) -> str:
            at = start + strings_at + offset
            return raw[at : raw.index(b"\0", at)].decode()

        types = [Type(0, "void", 0, False)]
        at, end = start + types_at, start + types_at + types_size
        while at < end:
            name, info, size = struct.unpack_from("<III", raw, at)
            kind, number, flag = info >> 24 & 0x1F, info & 0xFFFF, bool(info >> 31)
            at += 12
            members: list[tuple[str, int, int]] = []
            element = count = 0
            if kind in (STRUCT, UNION):
                for name_at, of, offset in struct.iter_unpack("<III", raw[at : at + 12 * number]):
                    members.append((text(name_at), of, offset))
            elif kind == DATASEC:
                for of, offset, _ in struct.iter_unpack("<III", raw[at : at + 12 * number]):
                    members.append((types[of].name if of < len(types) else "", of, offset))
            elif kind == ARRAY:
                element, _, count = struct.unpack_from("<III", raw, at)
            elif kind > ENUM64:
                raise ValueError(f"BTF kind {kind} is not known")
            types.append(Type(kind, text(name), size, flag, tuple(members), element, count))
            fixed, each = TAIL.get(kind, (0, 0))
            at += fixed + each * number
        return cls(types)

    def dtype(self, number: int) -> Dtype:
        """This type as numpy sees it. Raises ValueError for what is no data, and for bit fields."""
        kind = self.types[number]
        if kind.kind in (INT, ENUM, ENUM64):
            return np.dtype(f"u{kind.size}")
        if kind.kind == PTR:
            return np.dtype("u8")
        if kind.kind in (TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG):
            return self.dtype(kind.size)
        if kind.kind == ARRAY:
            return np.dtype((self.dtype(kind.element), (kind.count,)))
        if kind.kind in (STRUCT, UNION):
            return self._struct(kind)
        raise ValueError(f"type {kind.name!r} of BTF kind {kind.kind} is no data")

    def _struct(self, kind: Type) -> Dtype:
        if kind.bitfields:
            raise ValueError(f"struct {kind.name} has bit fields")
        names, formats, offsets = [], [], []
        for index, (name, of, offset) in enumerate(kind.members):
            names.append(name or f"unnamed{index}")
            formats.append(self.dtype(of))
            offsets.append(offset // 8)
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": kind.size})

    def offset(self, section: str, variable: str) -> int | None:
        """Where a global variable lies in its section, e.g. `.rodata`; None if there is none of this name."""
        for kind in self.types:
            if kind.kind == DATASEC and kind.name == section:
                for _, of, offset in kind.members:
                    if self.types[of].name == variable:
                        return offset
        return None


def differences(ours: np.dtype[np.void] | np.dtype[np.generic], theirs: Dtype) -> list[str]:
    """What keeps two dtypes from meaning the same bytes: size, and every field's name, place and size.

    How C groups the bytes of one field (a union, words of an address) is its own affair, and so is a
    struct of one number.
    """
    wrong = [] if ours.itemsize == theirs.itemsize else [f"{theirs.itemsize} bytes in C, {ours.itemsize} in Python"]
    if ours.fields is None or theirs.fields is None:
        return wrong
    for name in dict.fromkeys([*ours.fields, *theirs.fields]):
        mine, other = ours.fields.get(name), theirs.fields.get(name)
        if mine is None or other is None:
            wrong.append(f"field {name} only in {'C' if mine is None else 'Python'}")
        elif (mine[1], mine[0].itemsize) != (other[1], other[0].itemsize):
            wrong.append(
                f"field {name}: {other[0].itemsize} bytes at {other[1]} in C, {mine[0].itemsize} at {mine[1]} in Python"
            )
    return wrong
