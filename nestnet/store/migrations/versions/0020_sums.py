"""What tenants have, what counts under grants, and what lives on hosts, is kept as it changes."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

EVERYONE = -1
MOST = 100_000_000_000  # A port without a rate of its own counts as this, in bit/s.


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "usage",
        sa.Column("tenant", number, nullable=False),
        sa.Column("grant", number, nullable=False),
        *(sa.Column(what, number, nullable=False) for what in ("networks", "segments", "ports", "rate")),
        sa.PrimaryKeyConstraint("tenant", "grant", name="pk_usage"),
    )
    op.create_index("ix_usage_grant", "usage", ["grant"])
    op.create_table(
        "host_total",
        *(sa.Column(what, number, nullable=False) for what in ("carrier", "host", "tenant", "networks", "ports")),
        sa.PrimaryKeyConstraint("carrier", "host", "tenant", name="pk_host_total"),
    )
    counts = """
        SELECT coalesce(n.tenant, 0), coalesce(n."grant", 0), {}, {}, {}, {} FROM network n {}
        WHERE n.tenant IS NOT NULL OR n."grant" IS NOT NULL GROUP BY 1, 2
    """
    into = """
        INSERT INTO usage (tenant, "grant", networks, segments, ports, rate) {}
        ON CONFLICT (tenant, "grant") DO UPDATE SET segments = segments + excluded.segments,
        ports = ports + excluded.ports, rate = rate + excluded.rate
    """
    rate = f"sum(CASE WHEN p.rate = 0 THEN {MOST} ELSE p.rate END)"
    op.execute(into.format(counts.format("count(*)", 0, 0, 0, "")))
    op.execute(into.format(counts.format(0, "count(*)", 0, 0, "JOIN segment s ON s.network = n.id")))
    op.execute(into.format(counts.format(0, 0, "count(*)", rate, "JOIN port p ON p.network = n.id")))
    for tenant in ("coalesce(n.tenant, 0)", str(EVERYONE)):
        op.execute(f"""
            INSERT INTO host_total (carrier, host, tenant, networks, ports)
            SELECT n.carrier, u.host, {tenant}, count(*), sum(u.count)
            FROM host_use u JOIN network n ON n.id = u.network GROUP BY 1, 2, 3
        """)
