"""What ports hang on, and DNS servers of segments."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "attachment",
        sa.Column("port", number, nullable=False),
        sa.Column("machine", number, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["machine"], ["machine.id"], name=op.f("fk_attachment_machine"), initially="DEFERRED", deferrable=True
        ),
        sa.ForeignKeyConstraint(
            ["port"],
            ["port.id"],
            name=op.f("fk_attachment_port"),
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("port", name=op.f("pk_attachment")),
        sa.UniqueConstraint("machine", "kind", "name", name=op.f("uq_attachment_machine_kind_name")),
    )
    with op.batch_alter_table("segment", schema=None) as batch_op:
        batch_op.add_column(sa.Column("dns", sa.Text(), nullable=False, server_default="[]"))
