/* Who has an address or a MAC, where a router sends it, and the generation counters. */
#pragma once
#include "packet.h"

INLINE struct owner *owner_by(struct owner_key *key, u32 seg, const struct address *address)
{
	key->prefixlen = 32 + 128;
	key->segment = seg;
	memcpy(key->address, address, 16);
	return bpf_map_lookup_elem(&owner, key);
}

INLINE struct owner *owner_of(u32 seg, const struct address *address)
{
	struct owner_key key;

	return owner_by(&key, seg, address);
}

INLINE u32 port_of(u32 seg, const struct address *address)
{
	struct owner *found = owner_of(seg, address);

	return found && found->kind == OWNER_PORT ? found->slot : 0;
}

INLINE struct route *route_by(struct route_key *key, u32 rtr, const struct address *address)
{
	key->prefixlen = 32 + 128;
	key->router = rtr;
	memcpy(key->address, address, 16);
	return bpf_map_lookup_elem(&route, key);
}

INLINE u32 route_of(u32 rtr, const struct address *address)
{
	struct route_key key;
	struct route *found = route_by(&key, rtr, address);

	return found ? found->segment : 0;
}

/* A router's share of the flow hash (rule 7): the last 32 bits of its MAC. */
INLINE u32 seed_of(const struct router *r)
{
	return (u32)r->mac[2] << 24 | r->mac[3] << 16 | r->mac[4] << 8 | r->mac[5];
}

INLINE struct mac *mac_of(u32 seg, const u8 *bytes)
{
	struct mac_key key = { .segment = seg };

	memcpy(key.mac, bytes, 6);
	return bpf_map_lookup_elem(&mac, &key);
}

/* Where a port lives: for a host, and while it moves, its own row says so, which makes moving it one row (rule 14). */
INLINE u32 place_of(const struct port *row)
{
	u32 slot = row->host;

	if (row->flags & HOSTS) {
		struct host *own = bpf_map_lookup_elem(&host, &slot);

		return own ? own->at : 0;
	}
	return slot;
}

#define COUNTER_OF(name, slot) ({ u32 slot_ = (slot); u64 *n_ = bpf_map_lookup_elem(&generation_##name, &slot_); n_ ? *n_ : 0; })

INLINE u64 epoch_now(void)
{
	u32 zero = 0;
	u64 *now = bpf_map_lookup_elem(&epoch, &zero);

	return now ? *(volatile u64 *)now : 0;
}

INLINE u64 driven_ns(void)
{
	u32 zero = 0;
	u64 *now = bpf_map_lookup_elem(&clock, &zero);

	return now ? *now : 0;
}

/* The monotonic clock, or what a test says it is. */
INLINE u64 now_ns(void) { return driven ? driven_ns() : bpf_ktime_get_ns(); }

INLINE void count_composed(u32 is_carriage)
{
	u32 zero = 0;
	struct composed *c = bpf_map_lookup_elem(&composed, &zero);

	if (c && is_carriage)
		c->carriages++;
	else if (c)
		c->flows++;
}

/* To the last tick is exact enough, and costs a load. */
INLINE u32 seconds(void) { return (driven ? driven_ns() : bpf_ktime_get_coarse_ns()) / 1000000000ull; }
