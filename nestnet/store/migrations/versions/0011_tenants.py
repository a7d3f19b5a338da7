"""Tenants that are suspended, and for which tenant a token was made by whom."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    flag = sa.Boolean(create_constraint=False)
    op.add_column("tenant", sa.Column("suspended", flag, nullable=False, server_default="0"))
    op.add_column("token", sa.Column("made_in", number, nullable=True))
    op.create_index("ix_tenant_parent", "tenant", ["parent"], unique=False)
