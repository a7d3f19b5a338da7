/* What this machine answers itself, for the port or router asked about: ARP, ND, echo of a router's address. */
#pragma once
#include "out.h"

INLINE int owner_mac(const struct owner *found, u8 *to)
{
	u32 slot = found->slot;

	if (found->kind == OWNER_PORT) {
		struct port *row = bpf_map_lookup_elem(&port, &slot);

		if (row)
			memcpy(to, row->mac, 6);
		return row != NULL;
	}
	struct router *row = bpf_map_lookup_elem(&router, &slot);

	if (row)
		memcpy(to, row->mac, 6);
	return row != NULL;
}

/*  14   16   18 19 20        22         28         32         38        42
 *  | 1  |0800| 6| 4| op      | sender   | sender   | target   | target  |      RFC 826
 *  |    |    |  |  |         | MAC      | IPv4     | MAC      | IPv4    |
 */
static const u8 arp_fixed[6] = { 0, 1, 8, 0, 6, 4 };

/* Who says that it has which address, and which one it asks for: into the tuple; `p->leaves` gets its MAC, `p->answered`
 * whether it asks. */
ONCE int parse_arp(struct __sk_buff *skb, struct packet *p)
{
	u8 arp[28];

	if (!p || load(skb, ETH_BYTES, arp, sizeof(arp)))
		return REASON_MALFORMED;
	for (int i = 0; i < 6; i++)
		if (arp[i] != arp_fixed[i])
			return REASON_MALFORMED;
	if (arp[6] || (arp[7] != 1 && arp[7] != 2))
		return REASON_MALFORMED;
	p->is_request = arp[7] == 1;
	p->tuple.family = 4;
	map_ipv4(&p->tuple.source, arp + 14);
	map_ipv4(&p->tuple.target, arp + 24);
	memcpy(p->leaves, arp + 8, 6);
	p->about_neighbours = 1;
	return 0;
}

ONCE int guard_arp(struct packet *p)
{
	if (!p || !same_mac(p->leaves, p->came + 6))
		return REASON_ARP_SPOOF;
	if (port_of(p->segment, &p->tuple.source) != p->source && !(p->is_request && !p->tuple.source.words[3]))
		return REASON_ARP_SPOOF;
	return 0;
}

ONCE int answer_arp(struct __sk_buff *skb, struct packet *p)
{
	struct owner *found;
	u8 reply[42], mac_[6];

	if (!p)
		return REASON_ERROR;
	if (!p->is_request || same_address(&p->tuple.source, &p->tuple.target))
		return REASON_ANNOUNCEMENT;
	found = owner_of(p->segment, &p->tuple.target);
	if (!found || !owner_mac(found, mac_))
		return REASON_ARP_UNKNOWN;
	if (found->kind == OWNER_PORT && found->slot == p->source)
		return REASON_ANNOUNCEMENT;
	memcpy(reply, p->came + 6, 6);
	memcpy(reply + 6, mac_, 6);
	reply[12] = 8;
	reply[13] = 6;
	memcpy(reply + 14, arp_fixed, 6);
	reply[20] = 0;
	reply[21] = 2;
	memcpy(reply + 22, mac_, 6);
	memcpy(reply + 28, &p->tuple.target.words[3], 4);
	memcpy(reply + 32, p->leaves, 6);
	memcpy(reply + 38, &p->tuple.source.words[3], 4);
	if (bpf_skb_change_tail(skb, sizeof(reply), 0) || bpf_skb_store_bytes(skb, 0, reply, sizeof(reply), 0))
		return REASON_ERROR;
	p->answered = 1;
	return 0;
}

#define ND_OPTIONS 8 /* more than anybody sends */

/* The MAC in the first link-layer address option of this type: 1 found, 0 none, -1 malformed. */
INLINE int nd_option(struct __sk_buff *skb, u32 at, u32 end, u8 type, u8 *to)
{
	u8 head[8];
	int found = 0;

	for (int i = 0; i < ND_OPTIONS; i++) {
		if (at == end)
			return found;
		if (at + 8 > end || load(skb, at, head, 8) || !head[1] || at + head[1] * 8 > end)
			return -1;
		if (head[0] == type && !found) {
			memcpy(to, head + 2, 6);
			found = 1;
		}
		at += head[1] * 8;
	}
	return at == end ? found : -1;
}

/* The relay (rule 25): fe80::1 on the link of a port whose workload runs an agent. Mirrors model/values.py. */
#define RELAY_PORT 4795
static const u8 nobody_mac[6] = { 6 }; /* mirrors model/packet.py */

INLINE int is_relay(const struct address *a)
{
	return a->words[0] == swap32(0xfe800000) && !a->words[1] && !a->words[2] && a->words[3] == swap32(1);
}

INLINE int has_relay(const struct packet *p)
{
	struct port *from = bpf_map_lookup_elem(&port, &p->source);

	return from && from->flags & AGENT;
}

/*  14     54    55    56   58           62        78      79   80     86
 *  | IPv6 | 136 | 0   | ck | R S O      | target  | 2     | 1  | MAC  |          RFC 4861, 4.4
 */
ONCE int advertise(struct __sk_buff *skb, struct packet *p, u32 is_router)
{
	u8 na[86] = {};
	u32 sum = 0;
	u16 check;

	if (!p)
		return REASON_ERROR;
	/* p->leaves has the owner's MAC in its source, p->given the target asked for. */
	memcpy(na, p->came + 6, 6);
	memcpy(na + 6, p->leaves + 6, 6);
	na[12] = 0x86;
	na[13] = 0xdd;
	na[14] = 0x60;
	na[19] = 32;
	na[20] = ICMPV6;
	na[21] = 255;
	memcpy(na + 22, &p->given, 16);
	memcpy(na + 38, &p->tuple.source, 16);
	na[54] = 136;
	na[58] = is_router ? 0xe0 : 0x60;
	memcpy(na + 62, &p->given, 16);
	na[78] = 2;
	na[79] = 1;
	memcpy(na + 80, p->leaves + 6, 6);
	for (int i = 22; i < 86; i += 2)
		sum += load16(na + i);
	check = fold(sum + 32 + ICMPV6); /* with the pseudo-header, RFC 8200, 8.1 */
	na[56] = check >> 8;
	na[57] = check;
	if (bpf_skb_change_tail(skb, sizeof(na), 0) || bpf_skb_store_bytes(skb, 0, na, sizeof(na), 0))
		return REASON_ERROR;
	p->answered = 1;
	return 0;
}

INLINE int is_discovery(const struct packet *p)
{
	return p->tuple.family == 6 && p->tuple.protocol == ICMPV6 && p->fragment == WHOLE &&
	       (p->icmp_type == 135 || p->icmp_type == 136);
}

/* Line 6: what is said, and about whom: into `p->given`. */
ONCE int guard_nd(struct __sk_buff *skb, struct packet *p)
{
	u8 option[6];
	int has;

	if (!p || p->ttl != 255 || p->icmp_code || p->end - p->l4 < 24 || load(skb, p->l4 + 8, &p->given, 16))
		return REASON_MALFORMED;
	has = nd_option(skb, p->l4 + 24, p->end, p->icmp_type == 135 ? 1 : 2, option);
	if (has < 0)
		return REASON_MALFORMED;
	if (has && !same_mac(option, p->came + 6))
		return REASON_ND_SPOOF;
	if ((p->icmp_type == 136 || is_unspecified(&p->tuple.source, 6)) && port_of(p->segment, &p->given) != p->source)
		return REASON_ND_SPOOF;
	p->about_neighbours = 1;
	return 0;
}

/* Solicitations and advertisements are never forwarded, but behind tags. */
ONCE int answer_nd(struct __sk_buff *skb, struct packet *p)
{
	struct owner *found;

	if (!p)
		return REASON_ERROR;
	found = owner_of(p->segment, &p->given);
	if (found && found->kind == OWNER_PORT && found->slot == p->source)
		return REASON_ANNOUNCEMENT;
	if (has_relay(p) && is_relay(&p->given)) {
		memcpy(p->leaves + 6, nobody_mac, 6);
		return advertise(skb, p, 0);
	}
	if (!found || !owner_mac(found, p->leaves + 6))
		return REASON_ND_UNKNOWN;
	return advertise(skb, p, found->kind == OWNER_ROUTER);
}

#define ROUTER_TTL 255 /* of what routers send themselves: it reaches back over any way */

/* An echo request to a router, or a fragment of one: back with the addresses changed over, each router on the way takes
 * one from the TTL. The checksum in the first fragment is over all of them, and only the type changes it. */
ONCE int answer_echo(struct __sk_buff *skb, struct packet *p)
{
	u32 v4 = p && p->tuple.family == 4;
	u8 macs[12], type = v4 ? 0 : 129, ttl;

	if (!p)
		return REASON_ERROR;
	ttl = ROUTER_TTL + 1 - (p->hops ? p->hops : 1);
	memcpy(macs, p->came + 6, 6);
	memcpy(macs + 6, p->came, 6);
	bpf_skb_store_bytes(skb, 0, macs, 12, 0);
	if (v4) {
		bpf_l3_csum_replace(skb, ETH_BYTES + 10, swap16((u16)p->ttl << 8), swap16((u16)ttl << 8), 2);
		bpf_skb_store_bytes(skb, ETH_BYTES + 8, &ttl, 1, 0);
		bpf_skb_store_bytes(skb, ETH_BYTES + 12, &p->tuple.target.words[3], 4, 0);
		bpf_skb_store_bytes(skb, ETH_BYTES + 16, &p->tuple.source.words[3], 4, 0);
	} else {
		bpf_skb_store_bytes(skb, ETH_BYTES + 7, &ttl, 1, 0);
		bpf_skb_store_bytes(skb, ETH_BYTES + 8, &p->tuple.target, 16, 0);
		bpf_skb_store_bytes(skb, ETH_BYTES + 24, &p->tuple.source, 16, 0);
	}
	if (p->fragment != LATER_FRAGMENT) {
		bpf_l4_csum_replace(skb, p->l4 + 2, swap16((u16)p->icmp_type << 8), swap16((u16)type << 8), 2);
		if (bpf_skb_store_bytes(skb, p->l4, &type, 1, 0))
			return REASON_ERROR;
	}
	p->answered = 1;
	return 0;
}
