"""Who may do what: the authority, tokens, and machines that have joined or are shut out."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("machine", sa.Column("joins", sa.Integer(), nullable=False, server_default="0"))
    op.add_column(
        "machine", sa.Column("fenced", sa.Boolean(create_constraint=False), nullable=False, server_default="0")
    )
    op.add_column("change", sa.Column("was_tenant", sa.Text(), nullable=True))
    op.create_table(
        "authority",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.LargeBinary(), nullable=False),
        sa.Column("certificate", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_authority_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_authority")),
    )
    op.create_table(
        "token",
        sa.Column("id", number, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("everything", sa.Text(), nullable=True),
        sa.Column("made", sa.Float(), nullable=False),
        sa.Column("until", sa.Float(), nullable=True),
        sa.Column("made_by", sa.Text(), nullable=False),
        sa.CheckConstraint("everything IN ('reader', 'owner')", name=op.f("ck_token_everything")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_token")),
        sa.UniqueConstraint("digest", name=op.f("uq_token_digest")),
        sa.UniqueConstraint("name", name=op.f("uq_token_name")),
    )
    op.create_table(
        "join_token",
        sa.Column("id", number, nullable=False),
        sa.Column("machine", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.Column("made_by", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_join_token")),
        sa.UniqueConstraint("digest", name=op.f("uq_join_token_digest")),
        sa.UniqueConstraint("machine", name=op.f("uq_join_token_machine")),
    )
    op.create_table(
        "token_tenant",
        sa.Column("token", number, nullable=False),
        sa.Column("tenant", number, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.CheckConstraint("role IN ('reader', 'owner')", name=op.f("ck_token_tenant_role")),
        sa.ForeignKeyConstraint(
            ["tenant"],
            ["tenant.id"],
            name=op.f("fk_token_tenant_tenant"),
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.ForeignKeyConstraint(
            ["token"],
            ["token.id"],
            name=op.f("fk_token_tenant_token"),
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("token", "tenant", name=op.f("pk_token_tenant")),
    )
    with op.batch_alter_table("token_tenant", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_token_tenant_tenant"), ["tenant"], unique=False)
