"""Revisions of objects, quotas of tenants, events, and what a restore needs."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

OBJECTS = ("tenant", "machine", "segment", "router", "link", "port", "policy")


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    for table in OBJECTS:
        op.add_column(table, sa.Column("revision", number, nullable=False, server_default="0"))
    for limit in ("networks", "segments", "ports"):
        op.add_column("tenant", sa.Column(limit, number, nullable=True))
    op.add_column(
        "store", sa.Column("confirmed", sa.Boolean(create_constraint=False), nullable=False, server_default="0")
    )
    op.add_column("vni_range", sa.Column("after", number, nullable=False, server_default="0"))
    op.create_table(
        "event",
        sa.Column("seq", number, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("audit", sa.Boolean(create_constraint=False), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("revision", number, nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_event")),
    )
    with op.batch_alter_table("event", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_event_audit_seq"), ["audit", "seq"], unique=False)
        batch_op.create_index(batch_op.f("ix_event_revision"), ["revision"], unique=False)
