"""Indexes for what is asked for among many networks, and how many objects of each kind there are."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

COUNTED = ("network", "segment", "router", "link", "port", "policy")


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_index("ix_network_tenant_name", "network", ["tenant", "name"])
    op.create_index("ix_network_tenant_carrier", "network", ["tenant", "carrier"])
    op.create_index("ix_network_carrier", "network", ["carrier"])
    for kind in ("network", "segment", "router", "link", "port"):
        op.create_index(f"ix_{kind}_name", kind, ["name"])
    op.create_table(
        "tally",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("n", number, nullable=False),
        sa.PrimaryKeyConstraint("kind", name="pk_tally"),
    )
    for kind in COUNTED:
        op.execute(f"INSERT INTO tally (kind, n) SELECT '{kind}', count(*) FROM \"{kind}\"")
    op.execute("UPDATE tally SET n = n - (SELECT count(*) FROM network WHERE id = 0) WHERE kind = 'network'")
