"""Nobody asks which networks live on a host but for their number, which `host_total` has."""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_host_use_host", "host_use")
