"""Whose objects somebody may see and change. An absent thing and one out of scope are the same: not there."""

from __future__ import annotations

from dataclasses import dataclass

from nestnet.model.errors import Forbidden


@dataclass(frozen=True, slots=True)
class Scope:
    """The tenants, by name, whose networks somebody may read and write; None: everything that there is, also what is
    no tenant's: machines, tenants, tokens, the store."""

    reads: frozenset[str] | None = None
    writes: frozenset[str] | None = None

    def may_read(self, tenant: str | None) -> bool:
        """May what belongs to this tenant be seen? None: what belongs to none."""
        return self.reads is None or (tenant is not None and tenant in self.reads)

    def may_write(self, tenant: str | None) -> bool:
        """May what belongs to this tenant be changed?"""
        return self.writes is None or (tenant is not None and tenant in self.writes)

    def to_write(self, tenant: str | None, what: str) -> None:
        """Raise Forbidden unless what belongs to this tenant may be changed."""
        if not self.may_write(tenant):
            raise Forbidden(f"{what} may be read, not changed: that takes a token with the role owner")

    def to_write_all(self, what: str) -> None:
        """Raise Forbidden unless this is the operator, whose all of it is."""
        if self.writes is not None:
            raise Forbidden(f"{what} is the operator's to change")

    @property
    def tenant(self) -> str | None:
        """Whose a new network is when nobody says: that of the only tenant."""
        return next(iter(self.writes)) if self.writes is not None and len(self.writes) == 1 else None


EVERYTHING = Scope()
NOTHING = Scope(frozenset(), frozenset())
