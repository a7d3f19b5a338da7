"""What a store keeps a count of, counted anew. A store that a test closes is looked at (conftest.py)."""

from __future__ import annotations

from sqlalchemy import Connection, text

from nestnet.store import Store

KINDS = ("network", "segment", "router", "link", "port", "policy")
USED = """
WITH part (network, segments, ports, rate) AS (
    SELECT network, 1, 0, 0 FROM segment UNION ALL
    SELECT network, 0, 1, CASE WHEN rate = 0 THEN 100000000000 ELSE rate END FROM port
), each (tenant, "grant", segments, ports, rate) AS (
    SELECT coalesce(tenant, 0), coalesce("grant", 0), total(segments), total(ports), total(rate)
    FROM network LEFT JOIN part ON part.network = network.id GROUP BY network.id
)
SELECT tenant, "grant", count(*), sum(segments), sum(ports), sum(rate) FROM each
WHERE tenant != 0 OR "grant" != 0 GROUP BY 1, 2
"""
KEPT = 'SELECT tenant, "grant", networks, segments, ports, rate FROM usage'
LIVING = """
WITH use (carrier, host, tenant, ports) AS (
    SELECT n.carrier, u.host, coalesce(n.tenant, 0), u.count FROM host_use u JOIN network n ON n.id = u.network
)
SELECT carrier, host, tenant, count(*), sum(ports) FROM use GROUP BY 1, 2, 3 UNION ALL
SELECT carrier, host, -1, count(*), sum(ports) FROM use GROUP BY 1, 2
"""
ON_HOSTS = """
WITH living (network, machine, port) AS (
    SELECT network, host_machine, host_port FROM port UNION ALL
    SELECT network, other_machine, other_port FROM port WHERE other_machine NOT NULL OR other_port NOT NULL
)
SELECT network, coalesce(living.port, machine.port, machine.id), count(*)
FROM living LEFT JOIN machine ON machine.id = living.machine GROUP BY 1, 2
"""
LEFT = """
SELECT * FROM usage WHERE tenant != 0 AND tenant NOT IN (SELECT id FROM tenant)
OR "grant" != 0 AND "grant" NOT IN (SELECT id FROM "grant")
"""


def check(store: Store) -> None:
    """What it keeps is what there is."""
    with store._database.read() as connection:
        counted, kept = _rows(connection, USED), _rows(connection, KEPT)
        assert {row for row in kept if any(row[2:])} == counted
        assert _rows(connection, "SELECT network, host, count FROM host_use") == _rows(connection, ON_HOSTS)
        assert _rows(connection, "SELECT carrier, host, tenant, networks, ports FROM host_total") == _rows(
            connection, LIVING
        )
        assert not _rows(connection, LEFT), "of somebody who is no more"
        tally = dict(map(tuple, connection.execute(text("SELECT kind, n FROM tally"))))
        for kind in KINDS:
            (n,) = connection.execute(text(f'SELECT count(*) FROM "{kind}" WHERE id != 0')).one()
            assert tally.get(kind, 0) == n, kind


def _rows(connection: Connection, query: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, row)) for row in connection.execute(text(query))}
