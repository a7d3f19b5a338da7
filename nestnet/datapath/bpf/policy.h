/* Whether a packet may (rules 40, 41): compile/tables.py says how the rows are read. */
#pragma once
#include "packet.h"

struct question {
	u32 network;        /* slot */
	u32 source, target; /* ports, or 0: nobody */
	struct address source_address, target_address;
	u16 port;           /* destination port, if the protocol has them */
	u8 protocol;
	u8 no_address;      /* the target has none of this family: only who it is counts */
	u32 from[3], to[3], about[3]; /* what to look for, by kind: see compile/tables.py */
	union {
		struct peer_key peer;
		struct cidr_key cidr;
		struct service_key service;
		struct rule_key rule;
		struct owner_key owner;
		struct route_key route;
	} key; /* the one being looked up */
};

INLINE u32 peer_class(struct question *q, u32 rules, u32 slot)
{
	struct peer *found;

	if (!slot)
		return 0;
	q->key.peer = (struct peer_key){ q->network, rules, slot };
	found = bpf_map_lookup_elem(&peer, &q->key.peer);
	return found ? IDENTITY + found->class : 0;
}

INLINE u32 cidr_class(struct question *q, u32 rules, const struct address *address)
{
	struct cidr *found;

	q->key.cidr.prefixlen = 64 + 128;
	q->key.cidr.network = q->network;
	q->key.cidr.rules = rules;
	memcpy(q->key.cidr.address, address, 16);
	found = bpf_map_lookup_elem(&cidr, &q->key.cidr);
	return found ? CIDR + found->class : 0;
}

INLINE u32 service_class(struct question *q, u32 rules)
{
	struct service *found;

	if (q->protocol != TCP && q->protocol != UDP)
		return 0;
	q->key.service = (struct service_key){ 64 + 24, q->network, rules, q->protocol, { q->port >> 8, q->port & 255 }, 0 };
	found = bpf_map_lookup_elem(&service, &q->key.service);
	return found ? CLASS + found->class : 0;
}

/* 1 if the network's policies allow it. At most 27 lookups, however many rules there are. */
ONCE int judge(struct question *q)
{
	struct network *net;
	u32 best = 0, combos, rules;

	if (!q)
		return 0;
	net = bpf_map_lookup_elem(&network, &q->network);
	if (!net)
		return 0;
	rules = net->rules;
	combos = net->combos;
	if (!rules)
		return 1;
	q->from[0] = q->to[0] = q->about[0] = 0;
	q->from[1] = peer_class(q, rules, q->source);
	q->from[2] = cidr_class(q, rules, &q->source_address);
	q->to[1] = peer_class(q, rules, q->target);
	q->to[2] = q->no_address ? 0 : cidr_class(q, rules, &q->target_address);
	q->about[1] = PROTOCOL + q->protocol;
	q->about[2] = service_class(q, rules);
	for (int i = 0; i < 3; i++) {
		if (i && !q->from[i])
			continue;
		for (int j = 0; j < 3; j++) {
			if (j && !q->to[j])
				continue;
			for (int k = 0; k < 3; k++) {
				struct rule *found;

				if (!(combos >> (i * 9 + j * 3 + k) & 1) || (k && !q->about[k]))
					continue;
				q->key.rule = (struct rule_key){ q->network, rules, q->from[i], q->to[j], q->about[k] };
				found = bpf_map_lookup_elem(&rule, &q->key.rule);
				/* Rank is one higher here, so that 0 is "no row". */
				if (found && found->rank + 1 > best)
					best = found->rank + 1;
			}
		}
	}
	return best && !((best - 1) & DENY);
}

/* Questions are put together here and not on the stack, of which a chain of calls has 512 bytes. */
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct question); } asking SEC(".maps");

INLINE struct question *ask(u32 net, u32 source, u32 target)
{
	u32 zero = 0;
	struct question *q = bpf_map_lookup_elem(&asking, &zero);

	if (q) {
		memset(q, 0, sizeof(*q));
		q->network = net;
		q->source = source;
		q->target = target;
	}
	return q;
}

INLINE int judge_tuple(u32 net, u32 source, u32 target, const struct tuple *t)
{
	struct question *q = ask(net, source, target);

	if (!q)
		return 0;
	q->source_address = t->source;
	q->target_address = t->target;
	q->port = t->target_port;
	q->protocol = t->protocol;
	return judge(q);
}

/* May this packet, to its target at its destination? */
ONCE int may(struct packet *p)
{
	return p ? judge_tuple(p->network, p->source, p->target, &p->tuple) : 0;
}
