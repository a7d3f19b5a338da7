"""Networks count their own changes. Those that there were begin with one."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("network", sa.Column("version", number, nullable=False, server_default="0"))
    op.execute("UPDATE network SET version = 1 WHERE id <> 0")
