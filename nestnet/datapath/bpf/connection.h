/* Connections (docs/datapath.md line 11): stateful policy, judged in the direction of the opener. */
#pragma once
#include "lookup.h"
#include "policy.h"

INLINE u64 verdict_sum(u32 net, u32 source, u32 target)
{
	return COUNTER_OF(policy, net) + COUNTER_OF(port, source) + COUNTER_OF(port, target);
}

INLINE int is_alive(const struct connection *c, u8 protocol, u32 now)
{
	u32 life = protocol != TCP ? OTHER_SECONDS : c->closing ? TCP_CLOSING_SECONDS : TCP_SECONDS;

	return now - c->seen < life;
}

INLINE void reverse(struct tuple *to, const struct tuple *from)
{
	to->source = from->target;
	to->target = from->source;
	to->source_port = from->target_port;
	to->target_port = from->source_port;
	to->protocol = from->protocol;
	to->family = from->family;
	to->vlan = 0;
}

/* "Established" alone never allows: when any counter has moved, the opener is judged again (rule 19). */
ONCE int opener_may(struct connection_key *key, struct connection *c, u32 net)
{
	u64 sum;

	if (!key || !c)
		return 0;
	sum = verdict_sum(net, key->source, key->target);
	if (c->sum != sum) {
		if (!judge_tuple(net, key->source, key->target, &key->tuple))
			return 0;
		c->sum = sum;
	}
	return 1;
}

INLINE struct connection *find(struct connection_key *key, u32 now)
{
	struct connection *c = bpf_map_lookup_elem(&connection, key);

	return c && is_alive(c, key->tuple.protocol, now) ? c : NULL;
}

/* The tuple of the packet that an ICMP error quotes. */
INLINE int quoted(struct __sk_buff *skb, struct packet *p, struct tuple *t)
{
	u32 at = p->l4 + 8, header;
	u8 ip[40], l4[8];

	memset(t, 0, sizeof(*t));
	t->family = p->tuple.family;
	if (t->family == 4) {
		if (at + 20 > p->end || load(skb, at, ip, 20))
			return 0;
		header = (ip[0] & 15) * 4;
		if (ip[0] >> 4 != 4 || header < 20 || load16(ip + 6) & 0x1fff)
			return 0;
		t->protocol = ip[9];
		map_ipv4(&t->source, ip + 12);
		map_ipv4(&t->target, ip + 16);
	} else {
		if (at + 40 > p->end || load(skb, at, ip, 40) || ip[0] >> 4 != 6)
			return 0;
		header = 40;
		t->protocol = ip[6];
		if (t->protocol == 0 || t->protocol == 43 || t->protocol == 44 || t->protocol == 51 || t->protocol == 60)
			return 0;
		memcpy(&t->source, ip + 8, 16);
		memcpy(&t->target, ip + 24, 16);
	}
	if (t->protocol != TCP && t->protocol != UDP && !is_icmp(t))
		return at + header <= p->end;
	if (at + header + 8 > p->end || load(skb, at + header, l4, 8))
		return 0;
	if (!is_icmp(t)) {
		t->source_port = load16(l4);
		t->target_port = load16(l4 + 2);
	} else if (icmp_kind(t->family, l4[0]) == ICMP_ECHO) {
		t->source_port = t->target_port = load16(l4 + 4);
	}
	return 1;
}

/* An ICMP error passes with the connection that it is about. */
ONCE int is_related(struct __sk_buff *skb, struct packet *p)
{
	struct connection *c;

	if (!p || !quoted(skb, p, &p->quote))
		return 0;
	p->key.source = p->target;
	p->key.target = p->source;
	p->key.tuple = p->quote;
	c = find(&p->key, p->now);
	if (c && opener_may(&p->key, c, p->network))
		return 1;
	p->key.source = p->source;
	p->key.target = p->target;
	reverse(&p->key.tuple, &p->quote);
	c = find(&p->key, p->now);
	return c && opener_may(&p->key, c, p->network);
}

INLINE int is_opening(const struct packet *p)
{
	return p->tuple.protocol == TCP && (p->tcp_flags & (SYN | ACK)) == SYN;
}

/* Line 11. Says what the packet is to a connection; `remember` makes or refreshes it once the packet has passed. */
ONCE int track(struct __sk_buff *skb, struct packet *p)
{
	struct connection *c;

	if (!p)
		return REASON_ERROR;
	p->tracked = UNTRACKED;
	if (p->about_neighbours)
		return 0;
	if (p->icmp_kind == ICMP_ERROR && p->fragment == WHOLE)
		return is_related(skb, p) ? 0 : REASON_ICMP_UNRELATED;
	if (p->icmp_kind == ICMP_ERROR || p->icmp_kind == ICMP_OTHER || (p->tuple.protocol == UDP && p->tuple.target_port == CARRIAGE_PORT))
		return may(p) ? 0 : REASON_POLICY;
	p->key.source = p->source;
	p->key.target = p->target;
	p->key.tuple = p->tuple;
	c = find(&p->key, p->now);
	if (c) {
		p->tracked = FORWARD;
		return opener_may(&p->key, c, p->network) ? 0 : REASON_POLICY;
	}
	if (!is_opening(p)) {
		p->key.source = p->target;
		p->key.target = p->source;
		reverse(&p->key.tuple, &p->tuple);
		c = find(&p->key, p->now);
		if (c && opener_may(&p->key, c, p->network)) {
			p->tracked = REPLY;
			return 0;
		}
	}
	if (!may(p))
		return REASON_POLICY;
	p->tracked = FORWARD;
	u64 *ever = bpf_map_lookup_elem(&opened, &p->source), *gone = bpf_map_lookup_elem(&closed, &p->source);
	struct port *row = bpf_map_lookup_elem(&port, &p->source);

	if (!ever || !gone || !row || *ever - *gone >= row->share)
		return REASON_CONNECTION_SHARE;
	return 0;
}

ONCE int remember(struct packet *p)
{
	struct connection *c, fresh = {};
	int closing;

	if (!p || p->tracked == UNTRACKED)
		return 0;
	p->key.source = p->tracked == FORWARD ? p->source : p->target;
	p->key.target = p->tracked == FORWARD ? p->target : p->source;
	if (p->tracked == FORWARD)
		p->key.tuple = p->tuple;
	else
		reverse(&p->key.tuple, &p->tuple);
	closing = p->tuple.protocol == TCP && p->tcp_flags & (FIN | RST);
	c = bpf_map_lookup_elem(&connection, &p->key);
	if (!c || !is_alive(c, p->key.tuple.protocol, p->now)) {
		fresh.sum = verdict_sum(p->network, p->key.source, p->key.target);
		fresh.seen = p->now;
		fresh.closing = closing;
		if (c) { /* it is over, and still in its opener's share */
			*c = fresh;
			return 0;
		}
		u64 *ever = bpf_map_lookup_elem(&opened, &p->key.source);

		if (bpf_map_update_elem(&connection, &p->key, &fresh, BPF_NOEXIST) == 0 && ever)
			__sync_fetch_and_add(ever, 1);
		return 0;
	}
	c->seen = p->now;
	if (closing)
		c->closing = 1;
	else if (p->tracked == FORWARD && is_opening(p))
		c->closing = 0;
	return 0;
}

INLINE void fragment_key_of(struct packet *p, struct fragment_key *key)
{
	key->port = p->source;
	key->source = p->tuple.source;
	key->target = p->tuple.target;
	key->id = p->fragment_id;
	key->protocol = p->tuple.protocol;
}

/* Line 7: a later fragment takes from the first what it does not have itself. */
ONCE int reassemble(struct packet *p)
{
	struct fragment_key key;
	struct fragment *first;

	if (!p || p->fragment != LATER_FRAGMENT)
		return 0;
	fragment_key_of(p, &key);
	first = bpf_map_lookup_elem(&fragment, &key);
	if (!first || p->now - first->seen >= FRAGMENT_SECONDS)
		return REASON_FRAGMENT_UNKNOWN;
	p->tuple.source_port = first->source_port;
	p->tuple.target_port = first->target_port;
	if (is_icmp(&p->tuple)) {
		p->icmp_type = first->type;
		p->icmp_kind = icmp_kind(p->tuple.family, p->icmp_type);
	}
	return 0;
}

ONCE int remember_fragment(struct packet *p)
{
	struct fragment_key key;
	struct fragment first;

	if (!p || p->fragment != FIRST_FRAGMENT)
		return 0;
	fragment_key_of(p, &key);
	first.source_port = p->tuple.source_port;
	first.target_port = p->tuple.target_port;
	first.type = p->icmp_type;
	first.seen = p->now;
	bpf_map_update_elem(&fragment, &key, &first, BPF_ANY);
	return 0;
}
