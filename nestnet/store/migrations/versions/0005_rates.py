"""Rates of ports and links, in bit/s; 0: no limit."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("link", "port"):
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.add_column(sa.Column("rate", sa.BigInteger(), nullable=False, server_default="0"))
