/* How a packet leaves: to a workload, to the wire, or counted as dropped. */
#pragma once
#include "path.h"
#include "tags.h"

/* For the agent, or under test: write down what was asked, or would be sent. 1: there is no room. */
ONCE int record(struct __sk_buff *skb, u32 kind, u32 slot, u32 what)
{
	struct record *r = bpf_ringbuf_reserve(&emitted, sizeof(*r), 0);
	u32 length = skb->len;

	if (!r)
		return 1;
	r->kind = kind;
	r->slot = slot;
	r->what = what;
	r->length = length;
	if (length > RECORD_BYTES)
		length = RECORD_BYTES;
	if ((kind == RECORD_WORKLOAD || kind == RECORD_VLAN) && skb->vlan_present) { /* as it will be seen */
		u32 rest = length - 12, tag = outermost(skb);

		r->length += TAG_BYTES;
		if (length > 12 && rest > 0 && rest <= RECORD_BYTES - 12 - TAG_BYTES) {
			bpf_skb_load_bytes(skb, 0, r->data, 12);
			bpf_skb_load_bytes(skb, 12, r->data + 12 + TAG_BYTES, rest);
		}
		for (int i = 0; i < TAG_BYTES; i++)
			r->data[12 + i] = tag >> (24 - 8 * i);
	} else if (kind != RECORD_DROP && length > 0) {
		bpf_skb_load_bytes(skb, 0, r->data, length);
	}
	bpf_ringbuf_submit(r, 0);
	return 0;
}

/* The one way to drop: counted for a port (0: the machine) under its reason. */
ONCE int drop(struct __sk_buff *skb, u32 slot, u32 reason)
{
	struct drops_key key = { slot, reason };
	u64 one = 1, *count = bpf_map_lookup_elem(&drops, &key);

	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&drops, &key, &one, BPF_ANY);
	if (recording)
		record(skb, RECORD_DROP, slot, reason);
	return TC_ACT_SHOT;
}

INLINE void count_out(u32 slot, u32 bytes)
{
	struct stats *s = bpf_map_lookup_elem(&stats, &slot);

	if (s) {
		s->out_packets++;
		s->out_bytes += bytes;
	}
}

INLINE void count_in(u32 slot, u32 bytes)
{
	struct stats *s = bpf_map_lookup_elem(&stats, &slot);

	if (s) {
		s->in_packets++;
		s->in_bytes += bytes;
	}
}

/* Into the workload's namespace, past its queue; or out to who has the tap open. The frame is as it shall arrive, but for
 * the tag of a port on a trunk. */
INLINE int to_workload(struct __sk_buff *skb, u32 slot, u32 ifindex, u32 is_tap, u32 tag)
{
	count_in(slot, skb->len);
	if (UNLIKELY(tag) && put_tag(skb, (u32)ETH_VLAN << 16 | tag))
		return drop(skb, slot, REASON_ERROR);
	if (recording) {
		record(skb, RECORD_WORKLOAD, slot, ifindex);
		return TC_ACT_SHOT;
	}
	if (is_tap)
		return bpf_redirect(ifindex, 0);
	/* It came addressed to a router or another port, so the kernel took it for somebody else's. */
	if (skb->pkt_type != PACKET_HOST)
		bpf_skb_change_type(skb, PACKET_HOST);
	return bpf_redirect_peer(ifindex, 0);
}

/* Out by the NIC of a trunk, with the tag of the VLAN: beside the bytes, so that a large packet stays whole. */
INLINE int to_vlan(struct __sk_buff *skb, u32 slot, u32 ifindex, u32 id)
{
	if (put_tag(skb, (u32)ETH_VLAN << 16 | id))
		return drop(skb, slot, REASON_ERROR);
	if (recording) {
		record(skb, RECORD_VLAN, 0, ifindex);
		return TC_ACT_SHOT;
	}
	return bpf_redirect(ifindex, 0);
}

/* What its own machine answers a workload. */
INLINE int back(struct __sk_buff *skb, struct packet *p)
{
	struct port *asker = bpf_map_lookup_elem(&port, &p->source);

	return to_workload(skb, p->source, p->where, asker ? asker->flags & TAP : 0, p->vlan);
}

/* TTL or hop limit less one for each router, of an IP header at this offset (RFC 1624 by the kernel's helper). */
INLINE void take_hops(struct __sk_buff *skb, u32 at, u8 family, u8 ttl, u8 hops)
{
	u8 less = ttl - hops;

	if (family == 4)
		bpf_l3_csum_replace(skb, at + 10, swap16((u16)ttl << 8), swap16((u16)less << 8), 2);
	bpf_skb_store_bytes(skb, at + (family == 4 ? 8 : 7), &less, 1, 0);
}

INLINE u16 fold(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (u16)~sum;
}

/*  0              14                  34          42         50                64
 *  | Ethernet     | IPv4              | UDP       | VXLAN    | inner Ethernet  | inner IP ...
 *  |                                    4789        I, VNI   |
 *
 *  0              14                  54          62         70                84
 *  | Ethernet     | IPv6              | UDP       | VXLAN    | inner Ethernet  | inner IP ...
 *
 * RFC 7348 figure 1; over IPv6 the UDP checksum is 0 as well (RFC 6935, for the inner packet has its own).
 * Lengths of a GSO packet describe the whole; whoever segments it sets them right. */
#define EALREADY 114

/* On a port: the levels below add their headers, too. Each time that there is no room in front of a packet Linux gives it twice
 * the memory, and at the tenth there is none left. So room for many is made at the first. */
#define RESERVE 1536

ONCE int reserve(struct __sk_buff *skb)
{
	return bpf_skb_adjust_room(skb, RESERVE, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO) ||
	       bpf_skb_adjust_room(skb, -RESERVE, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO);
}

/* What is a tunnel's already cannot be made one again: to Linux it stays that, and grows. Only where bytes come off can it be
 * told that it is of the other family now, so some more go on. */
ONCE int make_more_room(struct __sk_buff *skb, u32 outer_bytes, u32 more)
{
	u32 family = outer_bytes == OUTER6 ? ETH_IPV6 : ETH_IPV4, spare = skb->protocol == swap16(family) ? 0 : 4;
	u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;

	if (bpf_skb_adjust_room(skb, outer_bytes + more + spare, BPF_ADJ_ROOM_MAC, flags))
		return REASON_ERROR;
	flags |= family == ETH_IPV6 ? BPF_F_ADJ_ROOM_DECAP_L3_IPV6 : BPF_F_ADJ_ROOM_DECAP_L3_IPV4;
	return spare && bpf_skb_adjust_room(skb, -4, BPF_ADJ_ROOM_MAC, flags) ? REASON_ERROR : 0;
}

/* `more` bytes are tags of the inner frame. */
INLINE int make_room(struct __sk_buff *skb, u32 outer_bytes, u32 more)
{
	u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2(ETH_BYTES + more) |
		    BPF_F_ADJ_ROOM_ENCAP_L2_ETH;

	long grown = bpf_skb_adjust_room(skb, outer_bytes + more, BPF_ADJ_ROOM_MAC,
					 flags | (outer_bytes == OUTER6 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV4));

	if (UNLIKELY(on_port) && !grown)
		return reserve(skb);
	return grown == -EALREADY ? make_more_room(skb, outer_bytes, more) : grown;
}

/* The outer headers and the Ethernet header of what is in them, in front of a frame for which there is room. */
INLINE int put_headers(struct __sk_buff *skb, const struct flow *f, u32 ecn)
{
	u8 *to = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u32 length = skb->len - ETH_BYTES;

	if (f->outer_bytes == OUTER6) {
		if (to + OUTER6 + ETH_BYTES > end)
			return REASON_ERROR;
		WORD32(to) = WORD32(f->outer);
		for (int i = 4; i < OUTER6 + ETH_BYTES; i += 8)
			WORD64(to + i) = WORD64(f->outer + i);
		length -= 40; /* both UDP's and IPv6's, which leaves its own header out */
		to[15] = ecn << 4; /* the lower half of the traffic class: DSCP 0; flow label 0 */
		WORD16(to + 18) = WORD16(to + 58) = swap16(length);
		return 0;
	}
	if (to + OUTER4 + ETH_BYTES > end)
		return REASON_ERROR;
	for (int i = 0; i < OUTER4 + ETH_BYTES; i += 8)
		WORD64(to + i) = WORD64(f->outer + OUTER6 - OUTER4 + i);
	to[15] = ecn; /* DSCP 0 (rule 1) */
	WORD16(to + 16) = swap16(length);
	WORD16(to + 24) = swap16(fold((u32)f->outer_sum + (length & 0xffff) + ecn));
	WORD16(to + 38) = swap16(length - 20);
	return 0;
}

ONCE int write_headers(struct __sk_buff *skb, struct flow *f, u32 ecn)
{
	return f ? put_headers(skb, f, ecn) : REASON_ERROR;
}

/* VXLAN in VXLAN. A large packet passes all levels whole. Whoever segments it in the end, Linux for a NIC that cannot,
 * sets right the lengths of the outermost headers and of the innermost packet, and copies all that is between:
 *
 *     | outer: set right | VXLAN of the levels above: copied | TCP: set right |
 *
 * So what is wrapped gets the lengths of one segment first, and who unwraps it gives it those that it has: the whole, or
 * less than was said, for the last segment is shorter. Linux, in a workload with VXLAN of its own, believes them. */
#define STACKED 32 /* levels that are looked through */
#define STACKED_BYTES 48 /* of a packet whose lengths are ever set: as much as is read. Mirrors model/packet.py */

INLINE int is_carriage(const struct tuple *t) { return t->protocol == UDP && t->target_port == CARRIAGE_PORT; }

/* Bytes behind the first Ethernet header and in front of what is segmented; `at` is the offset of the outermost UDP. */
ONCE u32 stacked_headers(struct __sk_buff *skb, u32 at)
{
	for (int i = 0; i < STACKED; i++) {
		u8 head[22], byte, ports[4]; /* EtherType, and the beginning of the IP header */
		u32 ip = at + 16 + ETH_BYTES, l4;
		u8 protocol;

		if (load(skb, ip - 2, head, sizeof(head)))
			break;
		if (head[0] == 0x08 && !head[1]) {
			l4 = ip + (head[2] & 15) * 4;
			protocol = head[11];
		} else if (head[0] == 0x86 && head[1] == 0xdd) {
			l4 = ip + 40;
			protocol = head[8];
		} else {
			break;
		}
		if (protocol == TCP && !load(skb, l4 + 12, &byte, 1))
			return l4 + (byte >> 4) * 4 - ETH_BYTES;
		if (protocol != UDP || load(skb, l4, ports, 4))
			break;
		at = l4;
		if (load16(ports + 2) != CARRIAGE_PORT)
			break;
	}
	return at + 8 - ETH_BYTES;
}

/* Of large packets under many levels it may be more than can be said: then nobody goes by it. */
INLINE u16 length_field(u32 bytes) { return swap16(bytes > 0xffff ? 0xffff : bytes); }

INLINE int set_lengths(struct __sk_buff *skb, u8 family, u32 was, u32 length)
{
	u32 six = family == 6, udp = ETH_BYTES + (six ? 40 : 20);
	u16 ip = length_field(six ? length - 40 : length), own = length_field(length - (six ? 40 : 20)), none = 0;

	if (!six && bpf_l3_csum_replace(skb, ETH_BYTES + 10, swap16(was), ip, 2))
		return REASON_ERROR;
	if (bpf_skb_store_bytes(skb, ETH_BYTES + (six ? 4 : 2), &ip, 2, 0) || bpf_skb_store_bytes(skb, udp + 4, &own, 2, 0))
		return REASON_ERROR;
	/* Over IPv4 it may be left out (RFC 7348, section 5), and it would be wrong now. */
	return !six && bpf_skb_store_bytes(skb, udp + 6, &none, 2, 0) ? REASON_ERROR : 0;
}

/* The family of what is VXLAN without options or extensions, and the length that it says it has; 0: it is none. */
INLINE u8 says_length(struct __sk_buff *skb, u32 *length)
{
	u8 head[ETH_BYTES + STACKED_BYTES], family = 0;

	if (skb->len >= sizeof(head) && !load(skb, 0, head, sizeof(head))) {
		if (head[12] == 0x08 && !head[13] && head[14] == 0x45 && !(head[20] & 0x3f) && !head[21] &&
		    head[23] == UDP && load16(head + 36) == CARRIAGE_PORT) {
			family = 4;
			*length = load16(head + 16);
		} else if (head[12] == 0x86 && head[13] == 0xdd && head[14] >> 4 == 6 && head[20] == UDP &&
			   load16(head + 56) == CARRIAGE_PORT) {
			family = 6;
			*length = load16(head + 18) + 40;
		}
	}
	return family;
}

/* Before it is wrapped. `headers` are those of one segment. */
ONCE int for_each_segment(struct __sk_buff *skb, u32 headers)
{
	u32 length = 0, segment = skb->gso_size + headers;
	u8 family = says_length(skb, &length);

	return family && segment < length ? set_lengths(skb, family, length, segment) : 0;
}

/* Behind the outer headers of a machine. */
ONCE int made_whole(struct __sk_buff *skb)
{
	u32 length = 0, there = skb->len - ETH_BYTES;
	u8 family = says_length(skb, &length);

	return family && (skb->gso_size ? length != there : length > there) ? set_lengths(skb, family, length, there) : 0;
}

/* `stacked`: headers of one segment of what is VXLAN already, and large; else 0. */
INLINE int encapsulate(struct __sk_buff *skb, struct flow *f, u32 ecn, u32 stacked)
{
	if (UNLIKELY(stacked) && for_each_segment(skb, stacked))
		return REASON_ERROR;
	return make_room(skb, f->outer_bytes, 0) ? REASON_ERROR : put_headers(skb, f, ecn);
}

/* With the tags that ride along. */
ONCE int make_room_for(struct __sk_buff *skb, struct flow *f, struct packet *p)
{
	if (!f || !p)
		return REASON_ERROR;
	if (p->ether_type == ETH_ARP && become(skb, ETH_IPV4))
		return REASON_ERROR;
	return make_room(skb, f->outer_bytes, tag_bytes(p)) ? REASON_ERROR : 0;
}

ONCE int encapsulate_tagged(struct __sk_buff *skb, struct flow *f, struct packet *p, u32 stacked)
{
	if (!f || !p || (stacked && for_each_segment(skb, stacked)) || make_room_for(skb, f, p))
		return REASON_ERROR;
	return write_headers(skb, f, p->ecn) || write_tags(skb, p, f->outer_bytes + 12) ? REASON_ERROR : 0;
}

/* The other way round: what is left begins with the inner Ethernet header. */
INLINE int take_room(struct __sk_buff *skb, u32 outer_bytes, u16 ether_type)
{
	u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO |
		    (ether_type == ETH_IPV6 ? BPF_F_ADJ_ROOM_DECAP_L3_IPV6 : BPF_F_ADJ_ROOM_DECAP_L3_IPV4);

	return bpf_skb_adjust_room(skb, -(int)outer_bytes, BPF_ADJ_ROOM_MAC, flags);
}

enum { HAS_NEIGHBOUR = 0, NEEDS_NEIGHBOUR = 1, NO_ROUTE = 2 };

/* The outer header to a machine, for a flow: what every packet of it gets, with the next hop resolved. */
ONCE int outer_header(struct __sk_buff *skb, struct flow *f, u32 to, u32 label, u32 source_port)
{
	struct bpf_fib_lookup fib = {};
	struct machine *there = bpf_map_lookup_elem(&machine, &to), *here;
	u32 zero = 0, sum = 0;
	struct self *me = bpf_map_lookup_elem(&self, &zero);
	long result;
	int six;
	u8 *o;

	if (!f || !there || !me)
		return NO_ROUTE;
	here = bpf_map_lookup_elem(&machine, &me->machine);
	if (!here)
		return NO_ROUTE;
	six = !is_mapped(there->address);
	if (six == is_mapped(here->address))
		return NO_ROUTE; /* one of them has just got an address of the other family */
	fib.family = six ? AF_INET6 : AF_INET;
	fib.l4_protocol = UDP;
	fib.sport = swap16(source_port);
	fib.dport = swap16(CARRIAGE_PORT);
	/* As if it came in by the workload's link, on which the agent has turned forwarding on: all that ever comes
	 * in there ends in our program, so this opens nothing. The machine's routes choose the NIC. */
	fib.ifindex = skb->ifindex;
	memcpy(fib.source, here->address + (six ? 0 : 12), 4);
	memcpy(fib.target, there->address + (six ? 0 : 12), 4);
	if (six) {
		memcpy(fib.source + 1, here->address + 4, 12);
		memcpy(fib.target + 1, there->address + 4, 12);
	}
	result = bpf_fib_lookup(skb, &fib, sizeof(fib), 0);
	if (result != BPF_FIB_LKUP_RET_SUCCESS && result != BPF_FIB_LKUP_RET_NO_NEIGH)
		return NO_ROUTE;
	f->ifindex = fib.ifindex;
	o = six ? f->outer : f->outer + OUTER6 - OUTER4;
	memset(f->outer, 0, OUTER6);
	memcpy(o, fib.dmac, 6);
	memcpy(o + 6, fib.smac, 6);
	if (six) {
		f->outer_bytes = OUTER6;
		o[12] = 0x86;
		o[13] = 0xdd;
		o[14] = 0x60;
		o[20] = UDP;
		o[21] = 64;
		memcpy(o + 22, here->address, 16);
		memcpy(o + 38, there->address, 16);
		o += OUTER6 - OUTER4; /* UDP and VXLAN are the same behind either */
	} else {
		f->outer_bytes = OUTER4;
		o[12] = 0x08;
		o[14] = 0x45;
		o[20] = 0x40; /* DF */
		o[22] = 64;
		o[23] = UDP;
		memcpy(o + 26, here->address + 12, 4);
		memcpy(o + 30, there->address + 12, 4);
		for (int i = 14; i < 34; i += 2)
			sum += load16(o + i);
		sum = (sum & 0xffff) + (sum >> 16);
		f->outer_sum = (sum & 0xffff) + (sum >> 16);
	}
	o[34] = source_port >> 8;
	o[35] = source_port;
	o[36] = CARRIAGE_PORT >> 8;
	o[37] = CARRIAGE_PORT & 255;
	o[42] = 0x08; /* I: the VNI is valid */
	o[46] = label >> 16;
	o[47] = label >> 8;
	o[48] = label;
	return result == BPF_FIB_LKUP_RET_SUCCESS ? HAS_NEIGHBOUR : NEEDS_NEIGHBOUR;
}
