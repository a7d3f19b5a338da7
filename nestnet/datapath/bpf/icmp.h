/* What a router tells the sender of a packet that ends at it: ICMP errors (model/icmp.py has the picture). */
#pragma once
#include "answer.h"
#include "rates.h"
#include "way.h"

/* Mirror model/icmp.py. */
#define TOLD_COST 10000000ull /* ns: 100 in a second */
#define TOLD_BURST 2000000000ull /* 200 at once */
#define QUOTE4 548 /* bytes, of messages that have 576 and 1280 */
#define QUOTE6 1232

struct quote { u8 bytes[QUOTE6 + 8]; };
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct quote); } quoting SEC(".maps");

INLINE int is_for_many(const struct address *a)
{
	if (is_mapped(a->bytes))
		return (a->bytes[12] & 0xf0) == 224 || a->words[3] == 0xffffffff;
	return a->bytes[0] == 0xff;
}

INLINE int may_be_told(const struct packet *p, u32 reason)
{
	return p->icmp_kind != ICMP_ERROR && p->fragment != LATER_FRAGMENT && !passes_no_router(&p->tuple) &&
	       !is_for_many(&p->tuple.target) && !(reason == REASON_ROUTER_LOCAL && is_icmp(&p->tuple));
}

INLINE u32 type_and_code(u32 reason, u8 family, u8 protocol)
{
	int v4 = family == 4;

	switch (reason) {
	case REASON_NO_ROUTE:
		return v4 ? 3 << 8 : 1 << 8;
	case REASON_UNREACHABLE:
		return v4 ? 3 << 8 | 1 : 1 << 8 | 3;
	case REASON_ROUTER_LOCAL:
		return v4 ? 3 << 8 | (protocol == TCP || protocol == UDP ? 3 : 2) : 1 << 8 | 4;
	case REASON_TOO_BIG:
		return v4 ? 3 << 8 | 4 : 2 << 8;
	case REASON_TTL_EXPIRED:
		return v4 ? 11 << 8 : 3 << 8;
	}
	return 0;
}

/* Which router it is that ends the packet: it is then p->router. Returns how many it passed before. */
ONCE u32 speaker(struct packet *p, u32 reason)
{
	struct segment *s;
	u32 passed = p && p->hops ? p->hops - 1 : 0;

	if (!p)
		return 0;
	switch (reason) {
	case REASON_NO_ROUTE:
		p->router = p->first;
		return 0;
	case REASON_TOO_BIG:
		s = bpf_map_lookup_elem(&segment, &p->segment);
		p->router = p->first ? p->first : s ? s->router : 0;
		return 0;
	case REASON_TTL_EXPIRED:
		passed = p->ttl ? p->ttl - 1 : 0;
		p->router = p->first;
		bpf_loop(passed, step_on, NULL, 0);
		return passed;
	}
	return passed;
}

/* The sum of the first bytes of what is quoted, as the Internet checksum adds (RFC 1071), and in network order. */
ONCE u32 quote_sum(struct __sk_buff *skb, u32 length)
{
	u32 zero = 0;
	u64 sum = 0;
	struct quote *q = bpf_map_lookup_elem(&quoting, &zero);

	if (!q || !length || length > QUOTE6 || load(skb, ETH_BYTES, q->bytes, length))
		return 0;
	for (int i = 0; i < 4; i++)
		q->bytes[length + i] = 0;
	for (u32 i = 0; i < QUOTE6 && i < length; i += 4)
		sum += *(u32 *)(q->bytes + i);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return swap16(sum);
}

/* In front of the packet, which is cut to what is quoted: `p->given` says from where, `p->leaves` from which MAC. */
ONCE int tell(struct __sk_buff *skb, struct packet *p, u32 message, u32 ttl, u32 mtu)
{
	u8 head[ETH_BYTES + 40 + 8] = {};
	u32 length, sum;
	u16 check;
	int v4;

	if (!p)
		return REASON_ERROR;
	v4 = p->tuple.family == 4;
	length = p->end - ETH_BYTES;
	if (length > (v4 ? QUOTE4 : QUOTE6))
		length = v4 ? QUOTE4 : QUOTE6;
	if (bpf_skb_change_tail(skb, ETH_BYTES + length, 0))
		return REASON_ERROR;
	sum = quote_sum(skb, length);
	memcpy(head, p->came + 6, 6);
	memcpy(head + 6, p->leaves + 6, 6);
	length += 8;

	if (v4) {
		u32 header = 0;

		head[12] = 8;
		head[14] = 0x45;
		head[16] = (length + 20) >> 8;
		head[17] = length + 20;
		head[20] = 0x40; /* DF */
		head[22] = ttl;
		head[23] = ICMP;
		memcpy(head + 26, &p->given.words[3], 4);
		memcpy(head + 30, &p->tuple.source.words[3], 4);
		for (int i = 14; i < 34; i += 2)
			header += load16(head + i);
		check = fold(header);
		head[24] = check >> 8;
		head[25] = check;
		head[34] = message >> 8;
		head[35] = message;
		head[40] = mtu >> 8;
		head[41] = mtu;
		check = fold(sum + message + (mtu & 0xffff));
		head[36] = check >> 8;
		head[37] = check;
	} else {
		head[12] = 0x86;
		head[13] = 0xdd;
		head[14] = 0x60;
		head[18] = length >> 8;
		head[19] = length;
		head[20] = ICMPV6;
		head[21] = ttl;
		memcpy(head + 22, &p->given, 16);
		memcpy(head + 38, &p->tuple.source, 16);
		head[54] = message >> 8;
		head[55] = message;
		head[60] = mtu >> 8;
		head[61] = mtu;
		sum += message + (mtu & 0xffff) + length + ICMPV6; /* with the pseudo-header, RFC 8200, 8.1 */
		for (int i = 22; i < 54; i += 2)
			sum += load16(head + i);
		check = fold(sum);
		head[56] = check >> 8;
		head[57] = check;
	}
	if (bpf_skb_adjust_room(skb, v4 ? 28 : 48, BPF_ADJ_ROOM_MAC, 0))
		return REASON_ERROR;
	return (v4 ? bpf_skb_store_bytes(skb, 0, head, ETH_BYTES + 28, 0) : bpf_skb_store_bytes(skb, 0, head, ETH_BYTES + 48, 0)) ?
		       REASON_ERROR : 0;
}

/* Does the sender get to know? Nothing has been done to the packet unless it does. */
ONCE int complain(struct __sk_buff *skb, struct packet *p, u32 reason, u32 mtu)
{
	struct face_key key;
	struct router *r;
	struct face *f;
	u64 *bucket;
	u32 message, passed;

	if (!p)
		return 0;
	message = type_and_code(reason, p->tuple.family, p->tuple.protocol);
	if (!message || !may_be_told(p, reason))
		return 0;
	passed = speaker(p, reason);
	r = bpf_map_lookup_elem(&router, &p->router);
	bucket = bpf_map_lookup_elem(&told, &p->source);
	if (!r || !r->id || !bucket || !spend(bucket, TOLD_COST, TOLD_BURST, now_ns()))
		return 0;
	key.router = p->router;
	key.segment = p->segment;
	f = bpf_map_lookup_elem(&face, &key);
	if (reason == REASON_ROUTER_LOCAL)
		p->given = p->tuple.target;
	else if (p->tuple.family == 4)
		memcpy(&p->given, f ? f->address4 : r->address4, 16);
	else
		memcpy(&p->given, f ? f->address6 : r->address6, 16);
	/* From where the packet went: the first router, or, from within the segment, the one that speaks. */
	memcpy(p->leaves + 6, p->first ? p->came : r->mac, 6);
	if (passed)
		take_hops(skb, ETH_BYTES, p->tuple.family, p->ttl, passed);
	return !tell(skb, p, message, ROUTER_TTL - passed, reason == REASON_TOO_BIG ? mtu : 0);
}

/* The end of a packet from a workload: counted, and if a router may say so, the sender is told. */
ONCE int refused(struct __sk_buff *skb, struct packet *p, u32 reason, u32 mtu)
{
	if (!p)
		return TC_ACT_SHOT;
	drop(skb, p->source, reason);
	return !p->tags && complain(skb, p, reason, mtu) ? back(skb, p) : TC_ACT_SHOT;
}
