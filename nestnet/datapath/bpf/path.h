/* What a packet has to pay on its way: the buckets of ports and links, leaving from the innermost to the outermost, arriving
 * back again (docs/datapath.md, Rates).
 *
 *     leaving    P.out, the links to Q;   then level by level, of what carries it: a.out, the links to b
 *     arriving   the same levels backwards: b.in;   then Q.in
 */
#pragma once
#include "carriage.h"
#include "rates.h"

struct path {
	u32 a, b;       /* hosts: the next level down */
	u32 family;     /* in which it is carried there */
	u32 above;      /* bytes that the levels so far have added */
	u32 router;     /* on the way through routers of this level; 0: not */
	u32 ports;      /* does the hash read ports? */
	u32 links;      /* are links paid here? */
	u32 done, reason;
	u32 leaving, arriving;
	u16 source_port, pad;
	struct tuple tuple;
	struct route_key key;
	struct tolls leave, arrive;
};

struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct path); } paying SEC(".maps");

/* They are found from the innermost on: those for who arrives stand at the end of their list, the last one first. */
INLINE int add_toll(struct path *w, struct tolls *to, u32 *count, u32 slot)
{
	u32 at = (to == &w->arrive ? PATH_BUCKETS - 1 - *count : *count) & (PATH_BUCKETS - 1);

	if (!slot)
		return 0;
	if (w->leaving + w->arriving >= PATH_BUCKETS) {
		w->reason = REASON_CANNOT_FLATTEN;
		w->done = 1;
		return 1;
	}
	to->each[at].bucket = slot;
	to->each[at].above = w->above;
	++*count;
	return 0;
}

/* One router on, or one level down. */
static long step_path(u32 index, void *nothing)
{
	u32 zero = 0;
	struct path *w = bpf_map_lookup_elem(&paying, &zero);
	struct host *a, *b;
	struct port *pa, *pb;
	struct network *n;

	if (!w)
		return 1;
	if (w->router) {
		struct route *row = route_by(&w->key, w->router, &w->tuple.target);
		struct router *r = bpf_map_lookup_elem(&router, &w->router);
		struct hop_key key;
		struct hop *found;

		w->router = 0;
		if (!row || !r || !row->count)
			return 0;
		key.router = w->key.router;
		key.group = row->group;
		key.index = flow_hash(&w->tuple, w->ports, seed_of(r)) % row->count;
		found = bpf_map_lookup_elem(&hop, &key);
		if (!found)
			return 0;
		w->router = found->next;
		return add_toll(w, &w->leave, &w->leaving, found->bucket);
	}
	w->done = 1;
	if (w->a == w->b)
		return 1;
	a = bpf_map_lookup_elem(&host, &w->a);
	b = bpf_map_lookup_elem(&host, &w->b);
	if (!a || !b || a->kind != KIND_PORT || b->kind != KIND_PORT)
		return 1;
	pa = bpf_map_lookup_elem(&port, &a->port);
	pb = bpf_map_lookup_elem(&port, &b->port);
	if (!pa || !pb)
		return 1;
	n = bpf_map_lookup_elem(&network, &pa->network);
	if (!n)
		return 1;
	w->done = 0;
	w->above += w->family == 6 ? 70 : 50;
	if (w->links && add_toll(w, &w->leave, &w->leaving, pa->out))
		return 1;
	if (add_toll(w, &w->arrive, &w->arriving, pb->in))
		return 1;
	if (w->links && pa->segment != pb->segment) {
		struct segment *s = bpf_map_lookup_elem(&segment, &pa->segment);

		w->router = s ? s->router : 0;
		memcpy(&w->tuple.source, w->family == 6 ? pa->address6 : pa->address4, 16);
		memcpy(&w->tuple.target, w->family == 6 ? pb->address6 : pb->address4, 16);
		w->tuple.source_port = w->source_port;
		w->tuple.target_port = CARRIAGE_PORT;
		w->tuple.protocol = UDP;
		w->ports = 1;
	}
	w->a = a->at;
	w->b = b->at;
	w->family = n->underlay;
	return 0;
}

/* A level, and each of its routers. */
#define PATH_STEPS (MAX_DEPTH * (MAX_HOPS + 2) + 256)

enum { LEAVES = 1, OWN = 2 };

/* Finds them for a packet whose way is known, from its host to `b`. LEAVES: it is a workload's here, so what its sender
 * pays counts too, and all together are few enough; OWN: and what its own network takes. Then the reason why not. */
ONCE int find_tolls(struct packet *p, u32 b, u32 what)
{
	u32 zero = 0, slot;
	struct path *w = bpf_map_lookup_elem(&paying, &zero);
	struct network *n;
	struct port *from, *to;

	if (!p || !w)
		return REASON_ERROR;
	w->leaving = w->arriving = 0;
	n = bpf_map_lookup_elem(&network, &p->network);
	if (!n || !(n->flags & RATED))
		return 0;
	w->a = p->a;
	w->b = b;
	w->family = n->underlay;
	w->above = w->router = w->done = w->reason = 0;
	w->links = what & LEAVES;
	w->source_port = outer_source_port(&p->tuple, p->fragment == WHOLE);
	if (what & OWN) {
		slot = p->source;
		from = bpf_map_lookup_elem(&port, &slot);
		slot = p->target;
		to = bpf_map_lookup_elem(&port, &slot);
		if (!from || !to)
			return REASON_ERROR;
		if (what & LEAVES) {
			add_toll(w, &w->leave, &w->leaving, from->out);
			w->router = p->first;
			w->tuple = p->tuple;
			w->ports = p->fragment == WHOLE;
		}
		add_toll(w, &w->arrive, &w->arriving, to->in);
	}
	bpf_loop(PATH_STEPS, step_path, NULL, 0);
	if (!w->done)
		return REASON_ERROR;
	return w->reason;
}

/* Into the flow: what is paid at this machine. */
INLINE void keep_tolls(struct flow *f, struct path *w, u32 arrives)
{
	u32 at = 0;

	for (u32 i = 0; i < PATH_BUCKETS; i++)
		if (i < w->leaving)
			f->toll.each[at++ & (PATH_BUCKETS - 1)] = w->leave.each[i];
	f->leaving = at;
	for (u32 i = 0; i < PATH_BUCKETS; i++)
		if (arrives && i < w->arriving && at < PATH_BUCKETS)
			f->toll.each[at++ & (PATH_BUCKETS - 1)] = w->arrive.each[(PATH_BUCKETS - w->arriving + i) & (PATH_BUCKETS - 1)];
	f->tolls = at;
}
