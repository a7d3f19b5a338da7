"""The VLAN that a machine's NICs are in, and of which standard its tags are."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("machine", schema=None) as batch_op:
        batch_op.add_column(sa.Column("vlan", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("vlan_type", sa.Text(), nullable=True))
