/* The short way: a flow that is known needs one lookup, a comparison of epochs, and its header. */
#pragma once
#include "guard.h"

enum { NOT_KNOWN = -2 };

/* Destination and source of a frame. */
INLINE int same_macs(const u8 *frame, const u8 *came)
{
	return WORD64(frame) == WORD64(came) && WORD32(frame + 8) == WORD32(came + 8);
}

INLINE u64 flow_sum(u32 source, u32 target, u32 net)
{
	return verdict_sum(net, source, target) + COUNTER_OF(route, net);
}

/* Flows that this CPU has seen in this second, in front of the map: copies, found without the kernel's help. One that is of
 * another second or epoch is none, so what holds for the map's holds for them. Of flows with one place the first has it for
 * the second. One array for all CPUs, CLOSE for each: that is a cache line less than a per-CPU one. */
struct close {
	struct flow_key key;
	u32 pad;
	struct flow flow;
};
#define CLOSE 256
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, CLOSE); __type(key, u32); __type(value, struct close); } close SEC(".maps");

INLINE struct close *place_of_flow(const struct flow_key *k)
{
	u32 h = mix(mix(k->where, k->tuple.source.words[3]), k->tuple.target.words[3]);
	u32 slot = bpf_get_smp_processor_id() * CLOSE + mix(h, WORD32(&k->tuple.source_port)) % CLOSE;

	return bpf_map_lookup_elem(&close, &slot);
}

INLINE int is_used(const struct close *c, u64 at, u32 now) { return c->flow.epoch == at && c->flow.seen == now; }

INLINE int is_key(const struct flow_key *x, const struct flow_key *y)
{
	for (int i = 0; i < 40; i += 8)
		if (WORD64((u8 *)x + i) != WORD64((u8 *)y + i))
			return 0;
	return x->where == y->where;
}

/* The epoch has moved: something changed, perhaps not for this flow. If all its counters stand, it takes the new one. */
ONCE int still_good(struct flow *f, u64 now)
{
	u32 zero = 0;
	struct packet *p = bpf_map_lookup_elem(&at_hand, &zero); /* for room: stacks are short */
	struct network *n;
	u64 sum;

	if (!f || !p)
		return 0;
	sum = flow_sum(f->source, f->target, f->network);
	n = bpf_map_lookup_elem(&network, &f->network);
	if (!n || carry(f->a, f->b, n->underlay, now, &p->way) || sum + p->way.sum != f->sum)
		return 0;
	f->epoch = now;
	return 1;
}

/* Once a second a flow says to its connection that it lives. 0: there is none any more. */
ONCE int touch(struct flow *f, struct flow_key *k, u32 now)
{
	struct connection_key key = {};
	struct connection *c;

	if (!f || !k)
		return 0;
	key.source = f->tracked == FORWARD ? f->source : f->target;
	key.target = f->tracked == FORWARD ? f->target : f->source;
	if (f->tracked == FORWARD)
		key.tuple = k->tuple;
	else
		reverse(&key.tuple, &k->tuple);
	key.tuple.vlan = 0;
	c = find(&key, now);
	/* One that is closing has seconds to live: the full path looks at every packet of it. */
	if (!c || c->closing)
		return 0;
	c->seen = now;
	f->seen = now;
	return 1;
}

/* Reads the usual packets without options, extensions or fragments, and TCP that neither opens nor closes. 0: not one of them.
 * `at` is the offset of the Ethernet header, `length` the bytes of IP packet there are. */
INLINE int read_usual(void *data, void *end, u32 at, u32 length, struct tuple *t, u8 *ttl, u8 *ecn, u32 *headers,
		      const int is_member)
{
	u8 *eth = data + at, *ip = eth + ETH_BYTES, *l4, protocol;
	u32 total, family, ports;

	if ((void *)ip + 28 > end)
		return 0;
	if (WORD16(eth + 12) == swap16(ETH_IPV4)) {
		if (ip[0] != 0x45 || WORD16(ip + 6) & swap16(0x3fff))
			return 0;
		total = swap16(WORD16(ip + 2));
		family = 4;
		protocol = ip[9];
		*ttl = ip[8];
		*ecn = ip[1] & 3;
		WORD64(&t->source.words[0]) = WORD64(&t->target.words[0]) = 0;
		WORD64(&t->source.words[2]) = swap32(0xffff) | (u64)WORD32(ip + 12) << 32;
		WORD64(&t->target.words[2]) = swap32(0xffff) | (u64)WORD32(ip + 16) << 32;
		l4 = ip + 20;
		*headers = 20;
	} else if (WORD16(eth + 12) == swap16(ETH_IPV6)) {
		if ((void *)ip + 48 > end || ip[0] >> 4 != 6)
			return 0;
		total = swap16(WORD16(ip + 4)) + 40;
		family = 6;
		protocol = ip[6];
		*ttl = ip[7];
		*ecn = ip[1] >> 4 & 3;
		WORD64(&t->source.words[0]) = WORD64(ip + 8);
		WORD64(&t->source.words[2]) = WORD64(ip + 16);
		WORD64(&t->target.words[0]) = WORD64(ip + 24);
		WORD64(&t->target.words[2]) = WORD64(ip + 32);
		l4 = ip + 40;
		*headers = 40;
	} else {
		return 0;
	}
	/* Of a member it may be a last segment: see out.h, VXLAN in VXLAN. */
	if (total > length &&
	    (!is_member || length < STACKED_BYTES || protocol != UDP || WORD16(l4 + 2) != swap16(CARRIAGE_PORT)))
		return 0;
	if (protocol == TCP) {
		if ((void *)l4 + 20 > end || total < *headers + 20 || l4[13] & (SYN | FIN | RST))
			return 0;
		*headers += (l4[12] >> 4) * 4;
		ports = WORD32(l4);
	} else if (protocol == UDP) {
		if (total < *headers + 8)
			return 0;
		*headers += 8;
		ports = WORD32(l4);
	} else if (protocol == (family == 4 ? ICMP : ICMPV6) && total >= *headers + 8 && icmp_kind(family, l4[0]) == ICMP_ECHO) {
		ports = WORD16(l4 + 4);
		ports |= ports << 16;
	} else {
		return 0;
	}
	/* Both ports in host order; protocol, family, no tag. */
	WORD64(&t->source_port) = (ports & 0xff00ff) << 8 | (ports >> 8 & 0xff00ff) | (u64)(protocol | family << 8) << 32;
	return 1;
}

/* Bytes that this takes. */
#define USUAL_INNER4 (ETH_BYTES + 20 + 20)
#define USUAL_INNER (ETH_BYTES + 40 + 20)

INLINE int too_long(struct __sk_buff *skb, u32 length, u32 headers, u32 mtu)
{
	return skb->gso_size ? skb->gso_size + headers > mtu : length > mtu;
}

INLINE u32 header_bytes(struct __sk_buff *skb, const struct packet *p)
{
	u8 offset = 0;

	if (UNLIKELY(skb->gso_size && is_carriage(&p->tuple)))
		return stacked_headers(skb, p->l4);
	if (p->tuple.protocol != TCP || p->fragment == LATER_FRAGMENT)
		return p->l4 - ETH_BYTES + 8;
	load(skb, p->l4 + 12, &offset, 1);
	return p->l4 - ETH_BYTES + (offset >> 4) * 4;
}

/* A packet from a workload, `tagged` if it has a tag beside its bytes. NOT_KNOWN: take the long way. */
INLINE int known_by(struct __sk_buff *skb, const int tagged)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct flow_key key __attribute__((aligned(8)));
	struct close *near;
	struct flow *f;
	u32 headers = 0, now, length = skb->len - ETH_BYTES, stacked = 0, zero = 0, tags = 0, outer = 0, inner = 0, weight;
	struct packet *p = NULL;
	u64 at;
	u8 ttl, ecn;
	int reason;

	if (tagged) {
		p = bpf_map_lookup_elem(&at_hand, &zero);
		outer = outermost(skb);
		if (!p || data + ETH_BYTES + TAG_BYTES > end)
			return NOT_KNOWN;
		if (is_tag(load16(data + 12)))
			inner = (u32)load16(data + 12) << 16 | load16(data + 14);
		if (inner)
			length -= TAG_BYTES;
	}
	if (tagged && inner) {
		if (!read_usual(data, end, TAG_BYTES, length, &key.tuple, &ttl, &ecn, &headers, 0))
			return NOT_KNOWN;
	} else if (!read_usual(data, end, 0, length, &key.tuple, &ttl, &ecn, &headers, 0)) {
		return NOT_KNOWN;
	}
	key.where = skb->ifindex;
	if (tagged && !inner && outer >> 16 == ETH_VLAN)
		key.tuple.vlan = outer & 0xfff;
	at = epoch_now();
	now = seconds();
	near = tagged ? NULL : place_of_flow(&key);
	if (near && is_used(near, at, now) && is_key(&near->key, &key))
		f = &near->flow;
	else
		f = tagged && !key.tuple.vlan ? NULL : bpf_map_lookup_elem(&flow, &key);
	if (tagged && !f) {
		tags = inner ? 2 : 1;
		key.tuple.vlan = RIDES;
		f = bpf_map_lookup_elem(&flow, &key);
	}
	if (!f || !same_macs(data, f->came))
		return NOT_KNOWN;
	if (UNLIKELY(f->epoch != at) && !still_good(f, at))
		return NOT_KNOWN;
	if (UNLIKELY(skb->gso_size && is_carriage(&key.tuple)))
		headers = stacked = stacked_headers(skb, ETH_BYTES + headers - 8 + (inner ? TAG_BYTES : 0)) - (inner ? TAG_BYTES : 0);
	if (too_long(skb, length, headers, f->mtu) || (f->hops && ttl <= f->hops))
		return NOT_KNOWN;
	if (UNLIKELY(f->seen != now)) {
		/* A connection is not told of what does not leave: the long way pays first. */
		if (f->tracked != UNTRACKED && (f->tolls || !touch(f, &key, now)))
			return NOT_KNOWN;
		f->seen = now;
	} else if (UNLIKELY(near && !is_used(near, at, now))) {
		near->key = key;
		near->flow = *f;
	}
	if (tagged && (bpf_skb_vlan_pop(skb) || (inner && bpf_skb_vlan_pop(skb))))
		return drop(skb, f->source, REASON_ERROR);
	weight = skb->len + tags * TAG_BYTES;
	if (UNLIKELY(f->tolls)) {
		reason = pay(skb, &f->toll, f->leaving << 16, weight, headers + tags * TAG_BYTES);
		if (reason)
			return drop(skb, f->source, reason);
	}
	count_out(f->source, weight);
	if (tagged) {
		p->tags = tags;
		p->tag[0] = outer;
		p->tag[1] = inner;
		p->ecn = ecn;
		p->ether_type = key.tuple.family == 4 ? ETH_IPV4 : ETH_IPV6;
	}
	if (f->out == TO_WIRE) {
		if (tagged && tags ? encapsulate_tagged(skb, f, p, stacked) : encapsulate(skb, f, ecn, stacked))
			return drop(skb, f->source, REASON_ERROR);
		if (f->hops)
			take_hops(skb, f->outer_bytes + ETH_BYTES, key.tuple.family, ttl, f->hops);
		if (recording) {
			record(skb, RECORD_WIRE, 0, f->ifindex);
			return TC_ACT_SHOT;
		}
		return bpf_redirect(f->ifindex, 0);
	}
	if (UNLIKELY(f->tolls) && f->leaving < f->tolls) {
		reason = pay(skb, &f->toll, f->leaving | f->tolls << 16, weight, headers + tags * TAG_BYTES);
		if (reason)
			return drop(skb, f->target, reason);
	}
	if (f->hops) {
		bpf_skb_store_bytes(skb, 0, f->leaves, 12, 0);
		take_hops(skb, ETH_BYTES, key.tuple.family, ttl, f->hops);
	}
	if (UNLIKELY(f->out == TO_VLAN))
		return to_vlan(skb, f->source, f->ifindex, f->tag);
	if (tagged && tags)
		put_tags(skb, p, 0);
	return to_workload(skb, f->target, f->ifindex, f->out == TO_TAP, f->tag);
}

ONCE int known_from_workload(struct __sk_buff *skb)
{
	return known_by(skb, 0);
}

ONCE int known_behind_tags(struct __sk_buff *skb)
{
	return known_by(skb, 1);
}

/* Is this the address in a field of the outer header, which is of the family that `outer` bytes are for? */
INLINE int is_address(const struct address *address, const u8 *field, const u32 outer)
{
	if (outer == OUTER4)
		return address->words[3] == WORD32(field) && address->words[2] == swap32(0xffff) && !address->words[1] && !address->words[0];
	return WORD64(field) == WORD64(address->bytes) && WORD64(field + 8) == WORD64(address->bytes + 8);
}

/* The header of a frame that came out of its outer headers. */
INLINE int put_inner(struct __sk_buff *skb, const struct flow *f)
{
	u8 *to = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (to + ETH_BYTES > end)
		return 1;
	WORD64(to) = WORD64(f->came);
	WORD32(to + 8) = WORD32(f->came + 8);
	WORD16(to + 12) = f->ether_type;
	return 0;
}

/* A VXLAN datagram that is for this machine. Reads at fixed places: the caller has looked at the outer headers, which
 * have `outer` bytes; `tags` ride in front of what is in it. */
INLINE int known_from_wire(struct __sk_buff *skb, u32 label, u32 outer_ecn, const u32 outer, const u32 tags)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct flow_key key __attribute__((aligned(8)));
	struct close *near;
	struct flow *f;
	u32 headers = 0, now, slot, ifindex, is_tap, tag, zero = 0, off = outer + tags * TAG_BYTES;
	struct packet *p = NULL;
	u64 at;
	u8 ttl, ecn;
	u16 ether_type;
	int reason;

	if (data + off + ETH_BYTES > end || outer_ecn == 3)
		return NOT_KNOWN;
	if (tags == 2 && !is_tag(load16(data + outer + 12 + TAG_BYTES))) /* the caller has seen the first */
		return NOT_KNOWN;
	if (UNLIKELY(data + off + USUAL_INNER4 > end ||
		     (((u8 *)data)[off + 12] == 0x86 && data + off + USUAL_INNER > end))) {
		bpf_skb_pull_data(skb, skb->len < off + USUAL_INNER ? skb->len : off + USUAL_INNER);
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		if (data + off + ETH_BYTES > end)
			return NOT_KNOWN;
	}
	if (!read_usual(data, end, off, skb->len - off - ETH_BYTES, &key.tuple, &ttl, &ecn, &headers, 1))
		return NOT_KNOWN;
	if (tags)
		key.tuple.vlan = RIDES;
	if (ecn == 2 && outer_ecn == 1)
		return NOT_KNOWN;
	key.where = FROM_WIRE | label;
	at = epoch_now();
	now = seconds();
	near = tags ? NULL : place_of_flow(&key);
	f = near && is_used(near, at, now) && is_key(&near->key, &key) ? &near->flow : bpf_map_lookup_elem(&flow, &key);
	if (!f || !is_address(&f->sender, data + ETH_BYTES + (outer == OUTER4 ? 12 : 8), outer) || !same_macs(data + outer, f->came))
		return NOT_KNOWN;
	if (UNLIKELY(f->epoch != at) && !still_good(f, at))
		return NOT_KNOWN;
	if (UNLIKELY(f->seen != now)) {
		if (f->tracked != UNTRACKED && !touch(f, &key, now))
			return NOT_KNOWN;
		f->seen = now;
	} else if (UNLIKELY(near && !is_used(near, at, now))) {
		near->key = key;
		near->flow = *f;
	}
	if (UNLIKELY(f->tolls)) {
		if (skb->gso_size && is_carriage(&key.tuple))
			headers = stacked_headers(skb, off + ETH_BYTES + headers - 8) - off;
		reason = pay(skb, &f->toll, f->tolls << 16, skb->len - outer, headers + tags * TAG_BYTES);
		if (reason)
			return drop(skb, f->target, reason);
	}
	ether_type = key.tuple.family == 4 ? ETH_IPV4 : ETH_IPV6;
	slot = f->target;
	ifindex = f->ifindex;
	is_tap = f->out == TO_TAP;
	tag = f->tag;
	if (tags) {
		p = bpf_map_lookup_elem(&at_hand, &zero);
		if (!p)
			return NOT_KNOWN;
		p->tags = 0;
		read_tags(skb, p, outer);
	}
	if (take_room(skb, off, ether_type) || put_inner(skb, f) || (UNLIKELY(is_carriage(&key.tuple)) && made_whole(skb)))
		return drop(skb, slot, REASON_ERROR);
	if (tags)
		put_tags(skb, p, 0);
	return to_workload(skb, slot, ifindex, is_tap, tag);
}

/* Twice, for either length of the outer headers: each knows its offsets when it is built. */
ONCE int known_over_ipv4(struct __sk_buff *skb, u32 label, u32 outer_ecn)
{
	return known_from_wire(skb, label, outer_ecn, OUTER4, 0);
}

ONCE int known_over_ipv6(struct __sk_buff *skb, u32 label, u32 outer_ecn)
{
	return known_from_wire(skb, label, outer_ecn, OUTER6, 0);
}

/* From a physical network, when the tag is off: `slot` is the segment that it is of. */
ONCE int known_from_vlan(struct __sk_buff *skb, u32 slot)
{
	void *data, *end;
	struct flow_key key __attribute__((aligned(8)));
	struct flow *f;
	u32 headers = 0, now, length = skb->len;
	u64 at;
	u8 ttl, ecn;
	int reason;

	bpf_skb_pull_data(skb, length < USUAL_INNER ? length : USUAL_INNER);
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (!read_usual(data, end, 0, length - ETH_BYTES, &key.tuple, &ttl, &ecn, &headers, 0))
		return NOT_KNOWN;
	key.where = FROM_WIRE | FROM_VLAN | slot;
	f = bpf_map_lookup_elem(&flow, &key);
	if (!f || !same_macs(data, f->came))
		return NOT_KNOWN;
	at = epoch_now();
	if (UNLIKELY(f->epoch != at) && !still_good(f, at))
		return NOT_KNOWN;
	now = seconds();
	if (UNLIKELY(f->seen != now)) {
		if (f->tracked != UNTRACKED && !touch(f, &key, now))
			return NOT_KNOWN;
		f->seen = now;
	}
	if (UNLIKELY(f->tolls)) {
		if (skb->gso_size && is_carriage(&key.tuple))
			headers = stacked_headers(skb, ETH_BYTES + headers - 8);
		reason = pay(skb, &f->toll, f->tolls << 16, length, headers);
		if (reason)
			return drop(skb, f->target, reason);
	}
	if (!same_mac(f->leaves + 6, f->came + 6)) /* it came through a router */
		bpf_skb_store_bytes(skb, 6, f->leaves + 6, 6, 0);
	return to_workload(skb, f->target, f->ifindex, f->out == TO_TAP, f->tag);
}

/* With one tag in front, or two. */
ONCE int riding_over_ipv4(struct __sk_buff *skb, u32 label, u32 outer_ecn)
{
	int action = known_from_wire(skb, label, outer_ecn, OUTER4, 1);

	return action == NOT_KNOWN ? known_from_wire(skb, label, outer_ecn, OUTER4, 2) : action;
}

ONCE int riding_over_ipv6(struct __sk_buff *skb, u32 label, u32 outer_ecn)
{
	int action = known_from_wire(skb, label, outer_ecn, OUTER6, 1);

	return action == NOT_KNOWN ? known_from_wire(skb, label, outer_ecn, OUTER6, 2) : action;
}
