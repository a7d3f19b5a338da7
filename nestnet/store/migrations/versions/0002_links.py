"""Links between routers."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "link",
        sa.Column("id", number, nullable=False),
        sa.Column("network", number, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("router", number, nullable=False),
        sa.Column("other", number, nullable=False),
        sa.Column("cost", sa.Integer(), nullable=False),
        sa.Column("up", sa.Boolean(create_constraint=False), nullable=False),
        sa.Column("labels", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.CheckConstraint("router <> other", name=op.f("ck_link_two_routers")),
        sa.ForeignKeyConstraint(
            ["network"], ["network.id"], name=op.f("fk_link_network"), initially="DEFERRED", deferrable=True
        ),
        sa.ForeignKeyConstraint(
            ["other"], ["router.id"], name=op.f("fk_link_other"), initially="DEFERRED", deferrable=True
        ),
        sa.ForeignKeyConstraint(
            ["router"], ["router.id"], name=op.f("fk_link_router"), initially="DEFERRED", deferrable=True
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_link")),
        sa.UniqueConstraint("network", "name", name=op.f("uq_link_network_name")),
    )
    with op.batch_alter_table("link", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_link_other"), ["other"], unique=False)
        batch_op.create_index(batch_op.f("ix_link_router"), ["router"], unique=False)
