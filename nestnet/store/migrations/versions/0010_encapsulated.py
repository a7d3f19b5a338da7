"""Networks whose hosts run agents of their own, and those agents: machines on ports."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    flag = sa.Boolean(create_constraint=False)
    op.add_column("network", sa.Column("encapsulated", flag, nullable=False, server_default="0"))
    op.add_column("machine", sa.Column("domain", number, nullable=False, server_default="0"))
    op.add_column("machine", sa.Column("port", number, nullable=True))
    op.add_column("change", sa.Column("was_encapsulated", flag, nullable=True))
    op.create_index("ix_machine_port", "machine", ["port"], unique=True)
    op.create_index("ix_machine_domain", "machine", ["domain"], unique=False)
