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
    op.add_column("port", sa.Column("trunk", number, nullable=True))
    op.add_column("port", sa.Column("tag", sa.Integer(), nullable=True))
    op.create_index("ix_port_trunk_tag", "port", ["trunk", "tag"], unique=True)
