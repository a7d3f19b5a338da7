/* The source guard: no port emits what it does not own (docs/datapath.md line 5). */
#pragma once
#include "answer.h"

/* What a port may send before it has an address: DHCP discovery; DAD, multicast listener reports, solicitations of
 * routers. */
INLINE int may_be_unspecified(const struct packet *p)
{
	if (p->fragment == LATER_FRAGMENT)
		return 0;
	if (p->tuple.family == 4)
		return p->tuple.protocol == UDP && p->tuple.source_port == 68 && p->tuple.target_port == 67 &&
		       p->tuple.target.words[3] == 0xffffffff;
	if (p->tuple.protocol != ICMPV6)
		return 0;
	if (p->icmp_type == 135)
		return 1;
	return ((p->icmp_type >= 130 && p->icmp_type <= 133) || p->icmp_type == 143) && p->tuple.target.bytes[0] == 0xff;
}

ONCE int guard(struct packet *p, u32 by_router)
{
	const struct tuple *t;

	if (!p)
		return REASON_ERROR;
	t = &p->tuple;
	if (t->family == 6 && t->protocol == ICMPV6 && p->fragment != LATER_FRAGMENT) {
		if (p->fragment == FIRST_FRAGMENT && p->icmp_type >= 133 && p->icmp_type <= 137)
			return REASON_ND_SPOOF;
		if (p->icmp_type == 134 || p->icmp_type == 137)
			return REASON_ROUTER_ADVERTISEMENT;
	}
	if (t->protocol == UDP && p->fragment != LATER_FRAGMENT && t->source_port == (t->family == 4 ? 67 : 547))
		return REASON_DHCP_SERVER;
	if (by_router) /* found by this very address */
		return passes_no_router(t) ? REASON_SOURCE_ADDRESS : 0;
	if (port_of(p->segment, &t->source) == p->source)
		return 0;
	return is_unspecified(&t->source, t->family) && may_be_unspecified(p) ? 0 : REASON_SOURCE_ADDRESS;
}
