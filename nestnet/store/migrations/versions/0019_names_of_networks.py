"""Names of networks are in one index less: those on the wire in the unique one, all others in one more."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_network_name", "network")
    op.drop_index("ix_network_tenant_name", "network")
    op.create_index("ix_network_name_tenant", "network", ["name", "tenant"], sqlite_where=sa.text("carrier != 0"))
