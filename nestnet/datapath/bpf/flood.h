/* What is for all (rule 10): a copy to each port here that may have it, one to each machine that carriers allow. */
#pragma once
#include "flow.h"

/* Which machines this frame has gone to: stamped with the number of the flood, so it needs no clearing. */
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1024); __type(key, u32); __type(value, u64); } copied SEC(".maps");

/* Which hosts this frame was charged to here, and why their carriers' rates refuse it: number of the flood << 8 | reason. */
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1024); __type(key, u32); __type(value, u64); } charged SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64); } floods SEC(".maps");

/* What a port pays for a frame for all, or one that is sent to it. */
ONCE int pay_alone(struct __sk_buff *skb, struct packet *p, u32 slot)
{
	u32 zero = 0;
	struct path *w = bpf_map_lookup_elem(&paying, &zero);

	if (!p || !w)
		return REASON_ERROR;
	w->leave.each[0].bucket = slot;
	w->leave.each[0].above = 0;
	return pay(skb, &w->leave, 1 << 16, skb->len + tag_bytes(p), header_bytes(skb, p) + tag_bytes(p));
}

/* What carriers take for the way to a host, once for each frame: to leave, and, if it is here, to arrive. */
ONCE int charge(struct __sk_buff *skb, struct packet *p, u32 to, u32 is_here)
{
	u32 zero = 0, leaves = p && !(p->where & FROM_WIRE), headers, length;
	struct path *w = bpf_map_lookup_elem(&paying, &zero);
	u64 *number = bpf_map_lookup_elem(&floods, &zero), *said = bpf_map_lookup_elem(&charged, &to);
	int reason;

	if (!p || !w || !number || !said)
		return REASON_ERROR;
	if (is_here && *said >> 8 == *number)
		return *said & 0xff;
	reason = find_tolls(p, to, leaves ? LEAVES : 0);
	headers = header_bytes(skb, p) + tag_bytes(p);
	length = skb->len + tag_bytes(p);
	if (!reason && leaves && w->leaving)
		reason = pay(skb, &w->leave, w->leaving << 16, length, headers);
	if (!reason && is_here && w->arriving)
		reason = pay(skb, &w->arrive, (PATH_BUCKETS - w->arriving) | PATH_BUCKETS << 16, length, headers);
	*said = *number << 8 | reason;
	return reason;
}

struct copies {
	struct __sk_buff *skb;
	struct packet *p;
	struct flow *f;
	u32 version, label, source_port, encapsulated;
	u64 stamp;
};

INLINE int copy_to_port(struct __sk_buff *skb, struct packet *p, u32 slot)
{
	struct port *q = bpf_map_lookup_elem(&port, &slot);
	struct network *n;
	struct question *asked;
	int reason;

	if (!p || !q || slot == p->source)
		return 0;
	n = bpf_map_lookup_elem(&network, &p->network);
	if (!n)
		return 0;
	if (!(q->flags & ENABLED))
		return drop(skb, slot, REASON_PORT_DISABLED);
	asked = ask(p->network, p->source, slot);
	if (!asked)
		return 0;
	asked->source_address = p->tuple.source;
	memcpy(&asked->target_address, p->tuple.family == 4 ? q->address4 : q->address6, 16);
	asked->no_address = is_unspecified(&asked->target_address, 6);
	asked->port = p->tuple.target_port;
	asked->protocol = p->tuple.protocol;
	if (!p->about_neighbours && !judge(asked))
		return drop(skb, slot, REASON_POLICY);
	reason = carry(p->a, place_of(q), n->underlay, p->epoch, &p->way);
	if (reason)
		return drop(skb, slot, reason);
	if (!q->ifindex)
		return drop(skb, slot, REASON_NOT_ATTACHED);
	if (n->flags & RATED) {
		reason = charge(skb, p, place_of(q), 1);
		if (!reason && q->in)
			reason = pay_alone(skb, p, q->in);
		if (reason)
			return drop(skb, slot, reason);
	}
	count_in(slot, skb->len + tag_bytes(p));
	put_tags(skb, p, q->tag);
	if (recording)
		record(skb, RECORD_WORKLOAD, slot, q->ifindex);
	else
		bpf_clone_redirect(skb, q->ifindex, 0);
	return drop_tags(skb, p, q->tag);
}

static long copy_here(u32 index, struct copies *c)
{
	struct local_key key = { c->p->segment, c->version, index };
	struct local *found = bpf_map_lookup_elem(&local, &key);

	if (found)
		copy_to_port(c->skb, c->p, found->port);
	return 0;
}

/* Machines that get no copy, because carriers' rates refuse one of their hosts, are taken as having theirs. */
static long charge_there(u32 index, struct copies *c)
{
	struct flood_key key = { c->p->segment, c->version, index };
	struct flood *found = bpf_map_lookup_elem(&flood, &key);
	struct network *n = bpf_map_lookup_elem(&network, &c->p->network);
	u32 zero = 0, to;
	struct self *me = bpf_map_lookup_elem(&self, &zero);
	u64 *gone;
	int reason;

	if (!found || !me || !n || carry(c->p->a, found->host, n->underlay, c->p->epoch, &c->p->way))
		return 0;
	to = c->p->way.machine;
	gone = bpf_map_lookup_elem(&copied, &to);
	if (!to || to == me->machine || !gone || *gone == c->stamp)
		return 0;
	reason = charge(c->skb, c->p, found->host, 0);
	if (reason) {
		*gone = c->stamp;
		drop(c->skb, c->p->source, reason);
	}
	return 0;
}

static long copy_there(u32 index, struct copies *c)
{
	struct flood_key key = { c->p->segment, c->version, index };
	struct flood *found = bpf_map_lookup_elem(&flood, &key);
	struct network *n = bpf_map_lookup_elem(&network, &c->p->network);
	u32 zero = 0, to;
	struct self *me = bpf_map_lookup_elem(&self, &zero);
	u64 *gone;
	int next_hop;

	if (!found || !me || !n || carry(c->p->a, found->host, n->underlay, c->p->epoch, &c->p->way))
		return 0;
	to = c->p->way.machine;
	gone = bpf_map_lookup_elem(&copied, &to);
	if (!to || to == me->machine || !gone || *gone == c->stamp)
		return 0;
	*gone = c->stamp;
	next_hop = outer_header(c->skb, c->f, to, c->label, c->source_port);
	/* A copy cannot wait for an answer to ARP, as redirected packets do: the agent keeps machines' neighbours known. */
	if (next_hop != HAS_NEIGHBOUR) {
		drop(c->skb, c->p->source, REASON_NO_UNDERLAY_ROUTE);
		return 0;
	}
	/* The second copy overwrites the outer headers of the first. */
	if (!c->encapsulated && make_room_for(c->skb, c->f, c->p))
		return 1;
	c->encapsulated = 1;
	memcpy(c->f->leaves, c->p->came, 12);
	c->f->ether_type = swap16(c->p->ether_type);
	if (write_headers(c->skb, c->f, c->p->ecn) ||
	    write_tags(c->skb, c->p, c->f->outer_bytes + 12))
		return 1;
	if (recording)
		record(c->skb, RECORD_WIRE, to, c->f->ifindex);
	else
		bpf_clone_redirect(c->skb, c->f->ifindex, 0);
	return 0;
}

/* On a VLAN the switches make the copies: one leaves if there is anybody elsewhere. */
static long is_anybody_there(u32 index, struct copies *c)
{
	struct flood_key key = { c->p->segment, c->version, index };
	struct flood *found = bpf_map_lookup_elem(&flood, &key);
	struct network *n = bpf_map_lookup_elem(&network, &c->p->network);
	u32 zero = 0;
	struct self *me = bpf_map_lookup_elem(&self, &zero);

	if (!found || !me || !n || carry(c->p->a, found->host, n->underlay, c->p->epoch, &c->p->way))
		return 0;
	c->encapsulated = c->p->way.machine && c->p->way.machine != me->machine;
	return c->encapsulated;
}

INLINE int to_all_on_vlan(struct __sk_buff *skb, struct packet *p, struct segment *s, struct copies *c)
{
	bpf_loop(s->floods, is_anybody_there, c, 0);
	if (!c->encapsulated)
		return TC_ACT_SHOT;
	return s->ifindex ? to_vlan(skb, p->source, s->ifindex, s->vlan) : drop(skb, p->source, REASON_NO_TRUNK);
}

struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct flow); } composing SEC(".maps");
ONCE int to_all(struct __sk_buff *skb, struct packet *p)
{
	u32 zero = 0;
	u32 slot = p ? p->segment : 0, sender = p ? p->source : 0, net = p ? p->network : 0;
	struct segment *s = bpf_map_lookup_elem(&segment, &slot);
	struct port *from = bpf_map_lookup_elem(&port, &sender);
	struct network *n = bpf_map_lookup_elem(&network, &net);
	struct flow *f = bpf_map_lookup_elem(&composing, &zero);
	u64 *number = bpf_map_lookup_elem(&floods, &zero);
	struct copies c = { .skb = skb, .p = p, .f = f };

	if (!p || !s || !from || !n || !f || !number)
		return drop(skb, 0, REASON_ERROR);
	c.stamp = ++*number;
	if (from->out && !(p->where & FROM_WIRE)) {
		int reason = pay_alone(skb, p, from->out);

		if (reason)
			return drop(skb, p->source, reason);
	}
	c.version = s->local;
	bpf_loop(s->locals, copy_here, &c, 0);
	if (p->where & FROM_WIRE)
		return TC_ACT_SHOT;
	c.version = s->flood;
	if (s->flags & ON_VLAN)
		return to_all_on_vlan(skb, p, s, &c);
	c.label = s->vni;
	c.source_port = outer_source_port(&p->tuple, p->fragment == WHOLE);
	if (n->flags & RATED)
		bpf_loop(s->floods, charge_there, &c, 0);
	bpf_loop(s->floods, copy_there, &c, 0);
	return TC_ACT_SHOT; /* the frame itself is done: its copies are on their way */
}
