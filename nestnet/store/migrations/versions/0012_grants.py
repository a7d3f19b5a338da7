"""Grants of hosts: other tenants' networks may be carried there. Tenants that there were keep the machines."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    flag = sa.Boolean(create_constraint=False)
    op.create_table(
        "grant",
        sa.Column("id", number, nullable=False),
        sa.Column("carrier", number, nullable=False),
        sa.Column("tenant", number, nullable=True),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("hosts", sa.Text(), nullable=True),
        sa.Column("networks", number, nullable=True),
        sa.Column("segments", number, nullable=True),
        sa.Column("ports", number, nullable=True),
        sa.Column("suspended", flag, nullable=False, server_default="0"),
        sa.Column("cut", flag, nullable=False, server_default="0"),
        sa.Column("ends", sa.Float(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("until", sa.Float(), nullable=True),
        sa.Column("revision", number, nullable=False, server_default="0"),
        sa.ForeignKeyConstraint(
            ["carrier"], ["network.id"], name="fk_grant_carrier", ondelete="CASCADE",
            deferrable=True, initially="DEFERRED",
        ),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenant.id"], name="fk_grant_tenant", ondelete="CASCADE", deferrable=True, initially="DEFERRED"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_grant"),
        sa.UniqueConstraint("carrier", "tenant", name="uq_grant_carrier_tenant"),
        sa.UniqueConstraint("tenant", "name", name="uq_grant_tenant_name"),
        sa.UniqueConstraint("digest", name="uq_grant_digest"),
    )  # fmt: skip
    op.add_column("network", sa.Column("cut", flag, nullable=False, server_default="0"))
    op.add_column("network", sa.Column("grant", number, nullable=True))
    op.create_index("ix_network_grant", "network", ["grant"], unique=False)
    store = op.get_bind()
    wired = "SELECT id FROM tenant WHERE EXISTS (SELECT 1 FROM network WHERE id = 0) ORDER BY id"
    tenants = store.execute(sa.text(wired)).scalars().all()
    insert = sa.text('INSERT INTO "grant" (id, carrier, tenant, name) VALUES (:id, 0, :tenant, :name)')
    for place, tenant in enumerate(tenants, 1):
        store.execute(insert, {"id": place, "tenant": tenant, "name": "hosts"})
    if tenants:
        store.execute(sa.text("INSERT INTO counter (kind, last) VALUES ('grant', :n)"), {"n": len(tenants)})
        own = 'SELECT g.id FROM "grant" g WHERE g.tenant = network.tenant'
        store.execute(sa.text(f'UPDATE network SET "grant" = ({own}) WHERE carrier = 0 AND id <> 0'))
        below = 'SELECT c.id FROM network c WHERE c."grant" IS NOT NULL'
        its = 'SELECT c."grant" FROM network c WHERE c.id = network.carrier'
        inherit = f'UPDATE network SET "grant" = ({its}) WHERE "grant" IS NULL AND id <> 0 AND carrier IN ({below})'
        while store.execute(sa.text(inherit)).rowcount:
            pass  # level by level
