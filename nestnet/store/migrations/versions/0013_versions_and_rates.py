"""Networks count their own changes, those that there were from one; limits of what ports may send."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("network", sa.Column("version", number, nullable=False, server_default="0"))
    op.add_column("tenant", sa.Column("rate", number, nullable=True))
    op.add_column("grant", sa.Column("rate", number, nullable=True))
    op.execute("UPDATE network SET version = 1 WHERE id <> 0")
