"""Ports that move: where else they live, and how far the move is."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("port", sa.Column("other_machine", number, nullable=True))
    op.add_column("port", sa.Column("other_port", number, nullable=True))
    op.add_column("port", sa.Column("leaving", sa.Boolean(create_constraint=False), nullable=False, server_default="0"))
    op.create_index("ix_port_other_machine", "port", ["other_machine"], unique=False)
    op.create_index("ix_port_other_port", "port", ["other_port"], unique=False)
    op.add_column("change", sa.Column("was_other", number, nullable=True))
    op.create_table(
        "move",
        sa.Column("port", number, nullable=False),
        sa.Column("source", number, nullable=False),
        sa.Column("target", number, nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("revision", number, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("connections", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(
            ["port"],
            ["port.id"],
            name=op.f("fk_move_port_port"),
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("port", name=op.f("pk_move")),
    )
