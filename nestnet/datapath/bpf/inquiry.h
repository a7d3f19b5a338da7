/* What a port asks of its machine (docs/datapath.md line 6). Inquiries: DHCP, and router solicitations. The agent answers
 * them, from the port's record. And the relay, which its sockets take from the machine's own stack. Here both are judged
 * by their form and number, and handed over. */
#pragma once
#include "guard.h"
#include "rates.h"

#define INQUIRY_BYTES 1500 /* of IP. Mirrors model/packet.py; a record has room for more */
/* ns: 20 at once, then two in a second. Mirrors model/rates.py. */
#define INQUIRY_COST 500000000ull
#define INQUIRY_BURST 10000000000ull
#define RELAY_COST 100000ull

INLINE int is_inquiry(const struct packet *p)
{
	const struct tuple *t = &p->tuple;

	if (p->fragment == LATER_FRAGMENT)
		return 0;
	if (t->family == 6 && t->protocol == ICMPV6)
		return p->icmp_type == 133;
	if (t->protocol != UDP)
		return 0;
	return t->family == 4 ? t->source_port == 68 && t->target_port == 67
			      : t->source_port == 546 && t->target_port == 547;
}

ONCE int to_agent(struct __sk_buff *skb, struct packet *p)
{
	u32 slot = p ? p->source : 0;
	u64 *until = bpf_map_lookup_elem(&asked, &slot);

	if (!p || !until)
		return TC_ACT_SHOT;
	if (p->fragment != WHOLE || p->end - ETH_BYTES > INQUIRY_BYTES)
		return drop(skb, p->source, REASON_MALFORMED);
	if (!spend(until, INQUIRY_COST, INQUIRY_BURST, now_ns()))
		return drop(skb, p->source, REASON_ASK_LIMIT);
	/* Nobody takes them out of the ring fast enough, or nobody does at all. */
	if (record(skb, RECORD_ASKED, p->source, p->where))
		return drop(skb, p->source, REASON_ASK_LIMIT);
	return TC_ACT_SHOT;
}

/* Link-local, and no address else: the machine's routes have no say in where answers go. */
INLINE int is_for_relay(const struct packet *p)
{
	const struct tuple *t = &p->tuple;
	const u8 *mac = p->came + 6, *a = t->source.bytes;

	return p->fragment == WHOLE && t->family == 6 && t->protocol == TCP && t->target_port == RELAY_PORT &&
	       is_relay(&t->target) && p->l4 == ETH_BYTES + 40 && same_mac(p->came, nobody_mac) &&
	       t->source.words[0] == swap32(0xfe800000) && !t->source.words[1] && a[8] == (mac[0] ^ 2) &&
	       a[9] == mac[1] && a[10] == mac[2] && a[11] == 0xff && a[12] == 0xfe && a[13] == mac[3] &&
	       a[14] == mac[4] && a[15] == mac[5];
}

/* For the relay, or asking who that is. */
ONCE int seeks_relay(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return 0;
	if (p->tuple.family == 6 && p->tuple.protocol == ICMPV6 && p->icmp_type == 135 && p->fragment == WHOLE)
		return p->end - p->l4 >= 24 && !load(skb, p->l4 + 8, &p->given, 16) && is_relay(&p->given);
	return is_for_relay(p);
}

/* The one thing from a workload that the machine's own stack ever hears. Its answers leave as they are. */
ONCE int to_relay(struct __sk_buff *skb, struct packet *p)
{
	u32 slot = p ? p->source : 0;
	u64 *until = bpf_map_lookup_elem(&asked, &slot);

	if (!p || !until)
		return TC_ACT_SHOT;
	if (!spend(until, RELAY_COST, INQUIRY_BURST, now_ns()))
		return drop(skb, p->source, REASON_ASK_LIMIT);
	if (recording) {
		record(skb, RECORD_RELAYED, p->source, p->where);
		return TC_ACT_SHOT;
	}
	/* Its MAC is nobody's, so the kernel took it for somebody else's. */
	return bpf_skb_change_type(skb, PACKET_HOST) ? drop(skb, p->source, REASON_ERROR) : TC_ACT_OK;
}
