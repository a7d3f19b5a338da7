/* carry(a, b): down the carriers, level by level, to the machine (docs/datapath.md, Carriage).
 *
 *     a ----------- b        hosts: ports of the carrier, or machines
 *     |  policies,  |
 *     |  routes ... |        each level asks its own rows
 *     v             v
 *     a' ---------- b'       where those ports live; down to the machine, and as soon as it is one host only whether it is up
 */
#pragma once
#include "connection.h"

struct walk {
	u32 a, b;
	u32 family;  /* the carried network's underlay: which address of a host port counts */
	u32 judging; /* 0: only add up the counters */
	u32 done, reason, machine;
	u64 sum;
};

/* Odd, and far from anything that counters add up to: 2^64 over the golden ratio, and over its square root. */
#define PLACE_A 0x9E3779B97F4A7C15ull
#define PLACE_B 0xC97D3A83E6F5B1CDull
#define LEVEL 0xD1342543DE82EF95ull /* odd as well: a good multiplier of a congruential generator */

/* One level between two host ports of one network. Returns the reason why not, or 0. */
ONCE int level_allows(struct walk *w, u32 net, u32 from, u32 to)
{
	struct network *n = bpf_map_lookup_elem(&network, &net);
	struct port *pa = bpf_map_lookup_elem(&port, &from), *pb = bpf_map_lookup_elem(&port, &to);
	struct question *q = ask(net, from, to);
	u32 rtr;

	if (!w || !q || !n || !pa || !pb || !(n->flags & pa->flags & pb->flags & ENABLED))
		return REASON_CARRIER_DOWN;
	if (from == to) /* it is there, and nobody else is asked */
		return 0;
	q->port = CARRIAGE_PORT;
	q->protocol = UDP;
	memcpy(&q->source_address, w->family == 6 ? pa->address6 : pa->address4, 16);
	memcpy(&q->target_address, w->family == 6 ? pb->address6 : pb->address4, 16);
	if (is_unspecified(&q->source_address, 6) || is_unspecified(&q->target_address, 6))
		return REASON_CARRIER_NO_ROUTE;
	if (!judge(q))
		return REASON_CARRIER_POLICY;
	if (pa->segment == pb->segment)
		return 0;
	struct segment *s = bpf_map_lookup_elem(&segment, &pa->segment);

	rtr = s ? s->router : 0;
	struct route *way = rtr ? route_by(&q->key.route, rtr, &q->target_address) : NULL;

	if (!way || way->segment != pb->segment)
		return REASON_CARRIER_NO_ROUTE;
	struct owner *there = owner_by(&q->key.owner, pb->segment, &q->target_address);

	if (!there || there->kind != OWNER_PORT || there->slot != to)
		return REASON_CARRIER_NO_ROUTE;
	return way->hops > MAX_HOPS ? REASON_CARRIER_TTL : 0;
}

struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct walk); } walking SEC(".maps");

static long step_down(u32 index, void *nothing)
{
	u32 zero = 0;
	struct walk *w = bpf_map_lookup_elem(&walking, &zero);
	struct host *a, *b;
	struct port *pa;
	struct network *n;
	u32 from, to, below_a, below_b, net;

	if (!w)
		return 1;
	a = bpf_map_lookup_elem(&host, &w->a);
	b = bpf_map_lookup_elem(&host, &w->b);
	/* Other places have other counters, which may come to the same sum: so the places are in it too, and in order. */
	w->sum = w->sum * LEVEL + COUNTER_OF(host, w->a) + COUNTER_OF(host, w->b) + w->a * PLACE_A + w->b * PLACE_B;
	if (!a || !b || !a->id || !b->id || a->kind != b->kind) {
		w->reason = REASON_CARRIER_DOWN;
		w->done = 1;
		return 1;
	}
	if (a->kind == KIND_MACHINE) {
		if (!a->at || !b->at)
			w->reason = REASON_CARRIER_DOWN;
		w->machine = b->at;
		w->sum = w->sum * LEVEL + COUNTER_OF(machine, b->at) + b->at * PLACE_B;
		w->done = 1;
		return 1;
	}
	from = a->port, to = b->port, below_a = a->at, below_b = b->at;
	pa = bpf_map_lookup_elem(&port, &from);
	net = pa ? pa->network : 0;
	w->sum += COUNTER_OF(port, from) + COUNTER_OF(port, to) + COUNTER_OF(policy, net) + COUNTER_OF(route, net);
	if (w->judging) {
		w->reason = level_allows(w, net, from, to);
		if (w->reason) {
			w->done = 1;
			return 1;
		}
	}
	n = bpf_map_lookup_elem(&network, &net);
	w->family = n ? n->underlay : 4;
	w->a = below_a;
	w->b = below_b;
	return 0;
}

INLINE void walk_down(struct walk *w, u32 a, u32 b, u32 family, u32 judging)
{
	*w = (struct walk){ .a = a, .b = b, .family = family, .judging = judging };
	bpf_loop(MAX_DEPTH, step_down, NULL, 0);
	if (!w->done)
		w->reason = REASON_CARRIER_DEPTH;
}

/* How a reaches b. Kept for the pair; after a foreign change one walk adds up the counters, and if they
 * are the same nothing is judged again (rule 17). The epoch must have been read before. */
ONCE int carry(u32 a, u32 b, u32 family, u64 now, struct carriage *out)
{
	struct carriage_key key = { a, b, family };
	struct carriage *kept = bpf_map_lookup_elem(&carriage, &key);
	u32 zero = 0;
	struct walk *w = bpf_map_lookup_elem(&walking, &zero);

	if (!out || !w)
		return REASON_ERROR;
	if (kept && kept->epoch != now) {
		walk_down(w, a, b, family, 0);
		if (w->sum == kept->sum)
			kept->epoch = now;
		else
			kept = NULL;
	}
	if (kept) {
		*out = *kept;
		return out->reason;
	}
	walk_down(w, a, b, family, 1);
	count_composed(1);
	out->epoch = now;
	out->sum = w->sum;
	out->reason = w->reason;
	out->machine = w->machine;
	bpf_map_update_elem(&carriage, &key, out, BPF_ANY);
	return out->reason;
}

/* The machine a host is on in the end; with `leaving`, the one it is moving from, if any on the way is (rule 15). */
ONCE u32 machine_of(u32 slot, u32 leaving)
{
	for (int i = 0; i <= MAX_DEPTH; i++) { /* the port's own row, if it is a host too, and one for each level */
		struct host *row = bpf_map_lookup_elem(&host, &slot);

		if (!row || !row->id)
			return 0;
		slot = leaving && row->from ? row->from : row->at;
		if (row->kind == KIND_MACHINE)
			return slot;
	}
	return 0;
}
