/* Inquiries: DHCP, and router solicitations (docs/datapath.md line 6). The agent answers them, from the
 * port's record; here they are judged by their form and number, and handed over. */
#pragma once
#include "guard.h"
#include "rates.h"

#define INQUIRY_BYTES 1500 /* of IP. Mirrors model/packet.py; a record has room for more */
/* ns: 20 at once, then two in a second. Mirrors model/rates.py. */
#define INQUIRY_COST 500000000ull
#define INQUIRY_BURST 10000000000ull

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
