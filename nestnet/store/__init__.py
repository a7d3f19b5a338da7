"""Desired state: what every network should be, and since which revision.

    tables.py       the tables, and migrations/ that make them
    database.py     SQLite opened safely: WAL, synchronous=FULL, one writer at a time
    identity.py     public ids, MACs, sealed tokens: keyed by the store's own key
    numbers.py      VNIs: free ranges and what may not be used again yet
    plan.py         a manifest compared with what is stored: a list of changes
    write.py        the changes as rows, under the next revision
    create.py       new networks from lines: plain ones straight as rows (plain.py, bulk.py), others by a plan
    read.py         rows as values (for agents) and as resources (for people)
    feed.py         what one machine needs, and what of it changed since a revision
    once.py         idempotency keys: a request is done once
    quotas.py       what tenants may have
    usage.py        what they have: sums, kept as it changes
    host_use.py     the same of what lives on hosts
    events.py       the audit log, and what machines noticed
    heard.py        what machines say every few seconds, in memory
    watch.py        objects that changed since a revision
    backup.py       a copy in one file, and the way back
    store.py        Store: all of this behind a few methods

Look at it from a shell with `sqlite3 -readonly FILE`: addresses, prefixes and labels are text.
"""

from nestnet.store.store import Store

__all__ = ["Store"]
