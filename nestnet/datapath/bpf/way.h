/* The routers on a way, one after the other. */
#pragma once
#include "packet.h"
#include "lookup.h"

/* One router on the way (docs/datapath.md, Words): it joins the segment, or hashes the flow onto its next hops. */
static long step_on(u32 index, void *nothing)
{
	u32 zero = 0;
	struct packet *p = bpf_map_lookup_elem(&at_hand, &zero);
	struct hop_key key;
	struct route *row;
	struct router *r;
	struct hop *found;

	if (!p)
		return 1;
	row = route_by(&p->key_of_route, p->router, &p->tuple.target);
	r = bpf_map_lookup_elem(&router, &p->router);
	if (!row || !r)
		return 1;
	p->hops++;
	if (!row->count) {
		p->arrived = 1;
		return 1;
	}
	key.router = p->router;
	key.group = row->group;
	key.index = flow_hash(&p->tuple, p->fragment == WHOLE, seed_of(r)) % row->count;
	found = bpf_map_lookup_elem(&hop, &key);
	if (!found)
		return 1;
	p->router = found->next;
	return 0;
}

#define WAY 255 /* a TTL lasts no longer */
