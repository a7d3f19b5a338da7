"""What to change: `diff(have, want)` is a list of actions, in an order that never misdirects a packet.

An action is a value: it can be printed, counted, tested and sent. The order (DESIGN, rule 18):

    1. add what nothing points to yet: machines, hosts, rules under their new version, lists
    2. rows that point to it, networks and segments last: one row switches a network's rules
    3. where frames come in, last of all: closed until everything behind it is there
    4. remove in reverse: where frames come in first
    5. counters of everything touched, then the epoch: a flow built across the change is born stale
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestnet.compile.tables import TABLES, Rows, Tables


@dataclass(frozen=True, eq=False)
class Put:
    """Write these rows (fields `key` and `value`) whether or not their keys are there."""

    table: str
    rows: Rows


@dataclass(frozen=True, eq=False)
class Delete:
    """Remove these keys; in an array, write zeros at these slots. A key that is gone is no error."""

    table: str
    keys: npt.NDArray[np.void] | npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Bump:
    """Add one to these slots of a generation counter (rule 16)."""

    counter: str
    slots: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Epoch:
    """Add one to the epoch: every flow compares its counters before its next packet."""


Action = Put | Delete | Bump | Epoch
