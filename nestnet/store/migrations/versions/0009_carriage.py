"""The row that whoever changes a carrier locks."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    carriage = op.create_table(
        "carriage",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("changes", number, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_carriage_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_carriage")),
    )
    op.bulk_insert(carriage, [{"id": 1, "changes": 0}])
