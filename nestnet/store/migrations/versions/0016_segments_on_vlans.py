"""Segments on VLANs of physical networks, and machines' trunks to these."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("store", sa.Column("vlans", sa.Integer(), nullable=False, server_default="4094"))
    op.add_column("store", sa.Column("vlans_after", number, nullable=False, server_default="0"))
    op.add_column("machine", sa.Column("trunks", sa.Text(), nullable=False, server_default="{}"))
    op.add_column("segment", sa.Column("physical", sa.Text(), nullable=True))
    op.add_column("segment", sa.Column("vlan", sa.Integer(), nullable=True))
    op.create_index("ix_segment_physical_vlan", "segment", ["physical", "vlan"], unique=True)
    op.create_table(
        "vlan_quarantine",
        sa.Column("physical", sa.Text(), nullable=False),
        sa.Column("vlan", sa.Integer(), nullable=False),
        sa.Column("revision", number, nullable=False),
        sa.PrimaryKeyConstraint("physical", "vlan", name="pk_vlan_quarantine"),
    )
