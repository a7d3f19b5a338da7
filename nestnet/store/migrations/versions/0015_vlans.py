"""Trunks: ports behind the tags of another one. Transparent segments."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    flag = sa.Boolean(create_constraint=False)
    op.add_column("segment", sa.Column("transparent", flag, nullable=False, server_default="0"))
    with op.batch_alter_table("port", schema=None) as batch_op:
        batch_op.add_column(sa.Column("trunk", number, nullable=True))
        batch_op.add_column(sa.Column("tag", sa.Integer(), nullable=True))
        batch_op.create_foreign_key(
            "fk_port_trunk_port", "port", ["trunk"], ["id"], deferrable=True, initially="DEFERRED"
        )
        batch_op.create_unique_constraint("uq_port_trunk_tag", ["trunk", "tag"])
        batch_op.create_index("ix_port_trunk", ["trunk"], unique=False)
