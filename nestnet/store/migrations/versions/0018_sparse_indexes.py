"""Indexes have no row for what is absent, a network that is new is one change, and what policies mean is shorter."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

SPARSE = (
    ("network", ("grant",), False),
    ("segment", ("physical", "vlan"), True),
    ("port", ("trunk", "tag"), True),
    ("port", ("host_machine",), False),
    ("port", ("host_port",), False),
    ("port", ("other_machine",), False),
    ("port", ("other_port",), False),
    ("address", ("port",), False),
    ("address", ("router",), False),
)


def upgrade() -> None:
    op.add_column("store", sa.Column("vnis", sa.Integer(), server_default="16777215", nullable=False))
    op.add_column("change", sa.Column("whole", sa.Boolean(), server_default="0", nullable=False))
    for table, columns, unique in SPARSE:
        name = f"ix_{table}_{'_'.join(columns)}"
        op.drop_index(name, table)
        op.create_index(name, table, list(columns), unique=unique, sqlite_where=sa.text(f'"{columns[0]}" IS NOT NULL'))
    parts = ", ".join(f"json(json_extract(value, '$.{part}'))" for part in ("sources", "targets", "services"))
    numbers = ", ".join(f"json_extract(value, '$.{part}')" for part in ("allow", "priority"))
    op.execute(f"UPDATE policy SET value = json_array({parts}, {numbers}) WHERE json_type(value) = 'object'")
