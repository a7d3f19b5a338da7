/* A frame, read: docs/datapath.md lines 2, 4 and 7. Nothing is judged here but its form. */
#pragma once
#include "hash.h"
#include "reasons.h"

enum {
	ETH_IPV4 = 0x0800, ETH_ARP = 0x0806, ETH_IPV6 = 0x86dd, ETH_RARP = 0x8035, ETH_VLAN = 0x8100, ETH_QINQ = 0x88a8,
	ICMP = 1, TCP = 6, UDP = 17, ICMPV6 = 58,
	FIN = 1, SYN = 2, RST = 4, ACK = 16,
	ETH_BYTES = 14,
	MAX_EXTENSIONS = 6,
	RIDING = 2,       /* tags that ride along in a transparent segment; mirrors model/packet.py */
	RIDING_BYTES = 8, /* room for them; mirrors model/values.py */
};
enum { WHOLE = 0, FIRST_FRAGMENT = 1, LATER_FRAGMENT = 2 };
enum { BEFORE_IP = 1, IN_IP = 2 };
enum { NOT_ICMP = 0, ICMP_ECHO = 1, ICMP_ERROR = 2, ICMP_OTHER = 3 };

/* One packet on its way, and what has been found out about it. One for each CPU. */
struct packet {
	struct tuple tuple;
	u8 came[12];        /* destination and source MAC */
	u8 leaves[12];
	u16 ether_type;
	u16 l4;             /* offset of the transport header */
	u16 end;            /* offset behind the IP packet */
	u8 fragment, icmp_kind;
	u8 icmp_type, icmp_code, tcp_flags, ttl;
	u8 ecn, answered, hops, tracked; /* hops: routers on the way, 0 if it is switched */
	u8 cut;             /* where a frame in VXLAN ends too early */
	u8 narrow;          /* is the segment where it came in transparent? */
	u8 tags;            /* how many ride along */
	u8 about_neighbours, is_request; /* ARP and ND; is it an ARP request? */
	u32 tag[RIDING];    /* EtherType << 16 | priority and id, outermost first */
	u32 vlan;           /* the id of the tag that it bore on its trunk */
	u32 fragment_id;

	u32 where;          /* ifindex, or FROM_WIRE | VNI, or FROM_WIRE | FROM_VLAN | segment */
	u32 source, target; /* ports; 0: nobody */
	u32 segment;        /* where it came in */
	u32 target_segment;
	u32 first, router;  /* the first on the way; where it got to, in the end the last; 0: switched */
	u32 arrived;
	u32 network;
	u32 a, b;           /* hosts */
	u32 sender;         /* machine slot, 0 for a workload; on a VLAN this one, that cannot be it */
	struct address sender_address;
	u32 outer_ecn;
	u32 now;            /* seconds */
	u64 epoch, sum;
	u32 reason_port;    /* whom a drop is counted for */
	struct address given; /* an argument of functions that need one more */
	struct tuple quote;   /* what an ICMP error is about */
	struct connection_key key; /* the connection being looked for: stacks are short */
	struct carriage way;  /* how it is carried */
	struct route_key key_of_route;
};

struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct packet); } at_hand SEC(".maps");

INLINE int load(struct __sk_buff *skb, u32 offset, void *to, u32 size)
{
	return bpf_skb_load_bytes(skb, offset, to, size);
}

INLINE void map_ipv4(struct address *to, const u8 *from)
{
	to->words[0] = 0;
	to->words[1] = 0;
	to->words[2] = swap32(0xffff);
	memcpy(&to->words[3], from, 4);
}

/* IPv4, as tables write it: ::ffff:a.b.c.d */
INLINE int is_mapped(const u8 *address)
{
	const u32 *words = (const u32 *)address;

	return !words[0] && !words[1] && words[2] == swap32(0xffff);
}

INLINE int same_address(const struct address *x, const struct address *y)
{
	return x->words[0] == y->words[0] && x->words[1] == y->words[1] && x->words[2] == y->words[2] &&
	       x->words[3] == y->words[3];
}

INLINE int is_unspecified(const struct address *a, u8 family)
{
	return family == 4 ? !a->words[3] : !(a->words[0] | a->words[1] | a->words[2] | a->words[3]);
}

/* Sources that mean nothing in another segment: no answer would find its way back. */
INLINE int passes_no_router(const struct tuple *t)
{
	const u8 *a = t->source.bytes;

	if (is_unspecified(&t->source, t->family))
		return 1;
	return t->family == 4 ? a[12] == 169 && a[13] == 254 : a[0] == 0xfe && (a[1] & 0xc0) == 0x80;
}

INLINE int same_mac(const u8 *x, const u8 *y)
{
	u32 hx, hy;
	u16 lx, ly;

	memcpy(&hx, x, 4);
	memcpy(&hy, y, 4);
	memcpy(&lx, x + 4, 2);
	memcpy(&ly, y + 4, 2);
	return hx == hy && lx == ly;
}

INLINE int is_tag(u16 ether_type) { return ether_type == ETH_VLAN || ether_type == ETH_QINQ; }

ONCE int parse_ethernet(struct __sk_buff *skb, struct packet *p)
{
	u8 eth[ETH_BYTES];

	if (!p || load(skb, 0, eth, sizeof(eth)))
		return REASON_MALFORMED;
	memcpy(p->came, eth, 12);
	p->ether_type = load16(eth + 12);
	if (skb->vlan_present || is_tag(p->ether_type))
		return p->tags || p->vlan ? REASON_TOO_MANY_TAGS : REASON_TAGGED;
	if (eth[0] == 0x01 && eth[1] == 0x80 && eth[2] == 0xc2 && !eth[3] && !eth[4] && eth[5] < 16)
		return REASON_CONTROL_FRAME;
	if (p->ether_type != ETH_IPV4 && p->ether_type != ETH_IPV6 && p->ether_type != ETH_ARP)
		return REASON_ETHER_TYPE;
	return 0;
}

INLINE int parse_ipv4(struct __sk_buff *skb, struct packet *p)
{
	u8 ip[20];
	u32 header, total, offset;

	if (load(skb, ETH_BYTES, ip, sizeof(ip)))
		return REASON_MALFORMED;
	header = (ip[0] & 15) * 4;
	total = load16(ip + 2);
	if (ip[0] >> 4 != 4 || header < 20 || total < header || ETH_BYTES + total > skb->len)
		return REASON_MALFORMED;
	offset = load16(ip + 6);
	p->fragment = offset & 0x1fff ? LATER_FRAGMENT : offset & 0x2000 ? FIRST_FRAGMENT : WHOLE;
	p->fragment_id = load16(ip + 4);
	p->tuple.family = 4;
	p->tuple.protocol = ip[9];
	p->ttl = ip[8];
	p->ecn = ip[1] & 3;
	map_ipv4(&p->tuple.source, ip + 12);
	map_ipv4(&p->tuple.target, ip + 16);
	p->l4 = ETH_BYTES + header;
	p->end = ETH_BYTES + total;
	return 0;
}

INLINE int parse_ipv6(struct __sk_buff *skb, struct packet *p)
{
	u8 ip[40], next, extension[8];
	u32 at = ETH_BYTES + 40, end, size;

	if (load(skb, ETH_BYTES, ip, sizeof(ip)))
		return REASON_MALFORMED;
	end = at + load16(ip + 4);
	if (ip[0] >> 4 != 6 || end > skb->len)
		return REASON_MALFORMED;
	p->tuple.family = 6;
	p->ttl = ip[7];
	p->ecn = ip[1] >> 4 & 3;
	memcpy(&p->tuple.source, ip + 8, 16);
	memcpy(&p->tuple.target, ip + 24, 16);
	/* Whoever bears an IPv4 address in an IPv6 header would pass for its owner in the other family. */
	if (is_mapped(p->tuple.source.bytes) || is_mapped(p->tuple.target.bytes))
		return REASON_MALFORMED;
	next = ip[6];
	for (int i = 0; i <= MAX_EXTENSIONS; i++) {
		if (next != 0 && next != 43 && next != 44 && next != 51 && next != 60)
			break;
		if (i == MAX_EXTENSIONS || at + 8 > end || load(skb, at, extension, 8))
			return REASON_MALFORMED;
		size = next == 44 ? 8 : next == 51 ? (extension[1] + 2) * 4 : (extension[1] + 1) * 8;
		if (at + size > end)
			return REASON_MALFORMED;
		if (next == 44) {
			u32 offset = load16(extension + 2);

			/* With neither, it is an atomic fragment: whole (RFC 6946). */
			if (offset & 0xfff9) {
				p->fragment = offset & 0xfff8 ? LATER_FRAGMENT : FIRST_FRAGMENT;
				p->fragment_id = (u32)load16(extension + 4) << 16 | load16(extension + 6);
			}
		}
		next = extension[0];
		at += size;
		if (p->fragment == LATER_FRAGMENT)
			break;
	}
	p->tuple.protocol = next;
	p->l4 = at;
	p->end = end;
	return 0;
}

INLINE int is_icmp(const struct tuple *t)
{
	return t->family == 4 ? t->protocol == ICMP : t->protocol == ICMPV6;
}

INLINE u8 icmp_kind(u8 family, u8 type)
{
	if (family == 4) {
		if (type == 8 || type == 0)
			return ICMP_ECHO;
		return type == 3 || type == 4 || type == 5 || type == 11 || type == 12 ? ICMP_ERROR : ICMP_OTHER;
	}
	if (type == 128 || type == 129)
		return ICMP_ECHO;
	return type >= 1 && type <= 4 ? ICMP_ERROR : ICMP_OTHER;
}

/* The IP header and what is behind it, into the tuple. */
ONCE int parse_ip(struct __sk_buff *skb, struct packet *p)
{
	u8 l4[8];
	int reason;

	if (!p)
		return REASON_ERROR;
	p->fragment = WHOLE;
	p->fragment_id = 0;
	p->icmp_kind = NOT_ICMP;
	p->icmp_type = p->icmp_code = p->tcp_flags = 0;
	p->tuple.source_port = p->tuple.target_port = 0;
	p->tuple.vlan = 0;
	reason = p->ether_type == ETH_IPV4 ? parse_ipv4(skb, p) : parse_ipv6(skb, p);
	if (reason)
		return reason;
	if (p->fragment == LATER_FRAGMENT)
		return 0;
	u32 room = p->end - p->l4;

	if (p->tuple.protocol == TCP) {
		u8 flags;

		if (room < 20 || load(skb, p->l4, l4, 4) || load(skb, p->l4 + 13, &flags, 1))
			return REASON_MALFORMED;
		p->tcp_flags = flags;
	} else if (p->tuple.protocol == UDP || is_icmp(&p->tuple)) {
		if (room < 8 || load(skb, p->l4, l4, 8))
			return REASON_MALFORMED;
	} else {
		return 0;
	}
	if (is_icmp(&p->tuple)) {
		p->icmp_type = l4[0];
		p->icmp_code = l4[1];
		p->icmp_kind = icmp_kind(p->tuple.family, l4[0]);
		if (p->icmp_kind == ICMP_ECHO)
			p->tuple.source_port = p->tuple.target_port = load16(l4 + 4);
	} else {
		p->tuple.source_port = load16(l4);
		p->tuple.target_port = load16(l4 + 2);
	}
	return 0;
}
