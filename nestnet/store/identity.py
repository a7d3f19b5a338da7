"""Numbers and texts that only this store can make: public ids, what agents on ports know rows by, MACs, sealed tokens.

A public id is a keyed permutation of the row number: it reveals neither how many objects there are
nor which came first, and needs no second index. It looks like `port_0h3vxk5sm2c8e`; no name can look like
that (names have no underscore), so an id works everywhere a path does.
"""

from __future__ import annotations

import base64
import hmac
import os
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b, sha512

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from nestnet.model.values import FABRIC

ROUNDS = 4  # Of a Feistel network: enough to be a pseudorandom permutation (Luby and Rackoff, 1988).
DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32, lower case: no i, l, o, u.
ID_DIGITS = 13  # 64 bits, 5 a digit.
SALT = 8  # bytes
KNOWN = 1 << 16  # Numbers of rows that are remembered: each takes some hashes.
TWEAKS = 1 << 8  # Permutations whose beginnings are remembered.


class Identity:
    """Everything that depends on the store's key."""

    def __init__(self, epoch: str, key: bytes) -> None:
        self._epoch = epoch
        self._key = key
        self._mixer = blake2b(digest_size=8, key=key)  # to be copied: the key has been taken in
        self._sealer = AESSIV(sha512(b"seal " + key).digest())
        # For agents: which store this is, in a word that tells nothing else.
        self.store = blake2b(epoch.encode(), digest_size=8, key=key, person=b"store").hexdigest()
        self._numbers = lru_cache(KNOWN)(self._number_on_ports)
        self._mixers = lru_cache(TWEAKS)(self._mixers_of)

    def public(self, kind: str, row: int) -> str:
        """The public id of a row."""
        return f"{kind}_{_digits(self._permute(row, 64, kind))}"

    def row(self, kind: str, public: str) -> int | None:
        """The row a public id stands for; None if it is not one of this kind."""
        head, _, digits = public.rpartition("_")
        number = _number(digits) if head == kind else None
        if number is None:
            return None
        row = self._unpermute(number, 64, kind)
        return row if row < 1 << 63 else None

    def number(self, kind: str, row: int, domain: int) -> int:
        """What the agents of a domain know a row by: in the fabric's itself, in others a number of 63 bits which is as
        opaque as a public id, and another one in each. 0 stays nobody."""
        return row if domain == FABRIC or row == 0 else self._numbers(kind, row, domain)

    def numbered(self, kind: str, number: int, domain: int) -> int:
        """The row that agents of a domain know by this number, or one that there is not."""
        if domain == FABRIC or not _is_number(number):
            return number
        row = self._unpermute(number, 64, f"feed {domain} {kind}")
        while not _is_number(row):
            row = self._unpermute(row, 64, f"feed {domain} {kind}")
        return row

    def _number_on_ports(self, kind: str, row: int, domain: int) -> int:
        # What falls outside is permuted again: so the others are a permutation of themselves.
        number = self._permute(row, 64, f"feed {domain} {kind}")
        while not _is_number(number):
            number = self._permute(number, 64, f"feed {domain} {kind}")
        return number

    def etag(self, kind: str, row: int, revision: int) -> str:
        """What the revision of an object is called: as opaque as a public id, and another one after a restore."""
        return _digits(self._permute(revision, 64, f"etag {self._epoch} {kind} {row}"))

    def revision_in(self, etag: str, kind: str, row: int) -> int | None:
        """The revision of an ETag of this object; None if it is none. Of a forged one it is any number at all."""
        number = _number(etag)
        return None if number is None else self._unpermute(number, 64, f"etag {self._epoch} {kind} {row}")

    def mac(self, kind: str, row: int, attempt: int = 0) -> int:
        """A locally administered MAC for a row: 02 for a port, 06 for a router. Another `attempt` gives another
        one, should somebody have chosen this."""
        first = 0x06 if kind == "router" else 0x02
        number = row
        for _ in range(attempt + 1):
            number = self._permute(number & (1 << 40) - 1, 40, f"mac {kind}")
        return first << 40 | number

    def macs(self, rows: Iterable[int]) -> list[int]:
        """The MACs of ports."""
        half, mask = 20, (1 << 20) - 1
        left, right = [row >> half & mask for row in rows], [row & mask for row in rows]
        for mixer in self._mixers("mac port"):
            left, right = right, [a ^ b for a, b in zip(left, _mix_all(mixer, right, mask), strict=True)]
        return [0x02 << 40 | a << half | b for a, b in zip(left, right, strict=True)]

    def seal(self, revision: int, stream: str = "", once: str | None = None) -> str:
        """A resume token: this store, this stream and this revision, and nobody can read it or make one up (RFC 5297).
        No two are alike, so none tells whether the store has changed; those for the same `once` are the same."""
        salt = os.urandom(SALT) if once is None else self._mark(once.encode(), stream)[:SALT]
        sealed = self._sealer.encrypt(revision.to_bytes(8), [self._epoch.encode(), stream.encode(), salt])
        return base64.urlsafe_b64encode(salt + sealed).decode().rstrip("=")

    def unseal(self, token: str, stream: str = "") -> int | None:
        """The revision in a token, or None if this store did not make it for this stream."""
        try:
            raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            said = self._sealer.decrypt(raw[SALT:], [self._epoch.encode(), stream.encode(), raw[:SALT]])
        except (ValueError, InvalidTag):
            return None
        return int.from_bytes(said)

    def secret(self, purpose: str) -> str:
        """43 characters that are always the same for one purpose, and nobody can work out."""
        mark = hmac.digest(self._key, f"secret {self._epoch} {purpose}".encode(), "sha256")
        return base64.urlsafe_b64encode(mark).decode().rstrip("=")

    def _mark(self, body: bytes, stream: str) -> bytes:
        return blake2b(body, digest_size=16, key=self._key, person=b"token " + stream.encode()).digest()

    def _permute(self, number: int, bits: int, tweak: str) -> int:
        half = bits // 2
        left, right = number >> half, number & (1 << half) - 1
        for mixer in self._mixers(tweak):
            left, right = right, left ^ _mix(mixer, right, half)
        return left << half | right

    def _unpermute(self, number: int, bits: int, tweak: str) -> int:
        half = bits // 2
        left, right = number >> half, number & (1 << half) - 1
        for mixer in reversed(self._mixers(tweak)):
            left, right = right ^ _mix(mixer, left, half), left
        return left << half | right

    def _mixers_of(self, tweak: str) -> tuple[blake2b, ...]:
        """That of each round."""
        found = tuple(self._mixer.copy() for _ in range(ROUNDS))
        for turn, mixer in enumerate(found):
            mixer.update(f"{turn} {tweak} ".encode())
        return found


def _mix(mixer: blake2b, number: int, bits: int) -> int:
    mixer = mixer.copy()
    mixer.update(b"%d" % number)
    return int.from_bytes(mixer.digest()) & (1 << bits) - 1


def _mix_all(mixer: blake2b, numbers: Iterable[int], mask: int) -> list[int]:
    """Each as `_mix` does it, in half the time."""
    copy, read = mixer.copy, int.from_bytes
    found = []
    for number in numbers:
        mixer = copy()
        mixer.update(b"%d" % number)
        found.append(read(mixer.digest()) & mask)
    return found


def _is_number(number: int) -> bool:
    """Of a row: above 0, and what a column holds."""
    return 0 < number < 1 << 63


def _digits(number: int) -> str:
    return "".join(DIGITS[number >> 5 * place & 31] for place in reversed(range(ID_DIGITS)))


def _number(digits: str) -> int | None:
    """The 64 bits that these digits are; None if they are none."""
    if len(digits) != ID_DIGITS or not set(digits) <= set(DIGITS):
        return None
    number = 0
    for digit in digits:
        number = number << 5 | DIGITS.index(digit)
    return None if number >> 64 else number
