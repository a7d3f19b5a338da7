/* What a port asks of its machine (docs/datapath.md line 6). Inquiries: DHCP, and router solicitations, which the agent
 * answers, from the port's record. And what is for the relay, which has it from the machine's own stack. Here both are
 * judged by their form and number, and handed over. */
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

/* What the machine itself does for a port has one bucket, whatever it is. */
ONCE int may_ask(struct packet *p, u64 cost)
{
	u32 slot = p ? p->source : 0;
	u64 *until = bpf_map_lookup_elem(&asked, &slot);

	if (!p || !until)
		return REASON_ERROR;
	return spend(until, cost, INQUIRY_BURST, now_ns()) ? 0 : REASON_ASK_LIMIT;
}

ONCE int to_agent(struct __sk_buff *skb, struct packet *p)
{
	int reason;

	if (!p)
		return TC_ACT_SHOT;
	reason = p->fragment != WHOLE || p->end - ETH_BYTES > INQUIRY_BYTES ? REASON_MALFORMED : may_ask(p, INQUIRY_COST);
	/* Nobody takes them out of the ring fast enough, or nobody does at all. */
	if (!reason && record(skb, RECORD_ASKED, p->source, p->where))
		reason = REASON_ASK_LIMIT;
	return reason ? drop(skb, p->source, reason) : TC_ACT_SHOT;
}

/* EUI-64 (RFC 4291, appendix A). */
INLINE int is_link_local_of(const struct address *a, const u8 *mac)
{
	const u8 *b = a->bytes;

	return a->words[0] == swap32(0xfe800000) && !a->words[1] && b[8] == (mac[0] ^ 2) && b[9] == mac[1] &&
	       b[10] == mac[2] && b[11] == 0xff && b[12] == 0xfe && b[13] == mac[3] && b[14] == mac[4] && b[15] == mac[5];
}

/* From the link-local address and no other, so that the machine's routes have no say in where answers go; without
 * extension headers, so that its stack reads none. */
INLINE int is_for_relay(const struct packet *p)
{
	const struct tuple *t = &p->tuple;

	return t->family == 6 && t->protocol == TCP && t->target_port == RELAY_PORT && is_relay(&t->target) &&
	       p->l4 == ETH_BYTES + 40 && same_mac(p->came, nobody_mac) && is_link_local_of(&t->source, p->came + 6);
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
	int reason = may_ask(p, RELAY_COST);

	if (!p)
		return TC_ACT_SHOT;
	if (reason)
		return drop(skb, p->source, reason);
	if (recording) {
		record(skb, RECORD_RELAYED, p->source, p->where);
		return TC_ACT_SHOT;
	}
	/* Its MAC is nobody's, so the kernel took it for somebody else's. */
	return bpf_skb_change_type(skb, PACKET_HOST) ? drop(skb, p->source, REASON_ERROR) : TC_ACT_OK;
}
