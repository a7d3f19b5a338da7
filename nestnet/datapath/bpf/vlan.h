/* The VLAN of the wire that the machine's NICs are in, if they are in one (docs/datapath.md, The underlay's VLAN). Whatever leaves
 * by them gets its tag, be it ours or the machine's own: ARP, ND, everything. What comes with it loses it.
 *
 *     untag   first thing on ingress        tag   a program on egress, when a frame is finished
 *
 * Linux has the first tag of a frame beside it (`vlan_present`), those behind it inside. So a large packet stays whole: the NIC,
 * or Linux for it, writes the tag into each segment. */
#pragma once
#include "out.h"

#define TAG_ID 0xfff

/* Bridge control addresses: what is sent there (LLDP, LACP, STP) ends at the link's other end, and is in no VLAN. */
INLINE int is_for_link(struct __sk_buff *skb)
{
	const u8 *to = (void *)(long)skb->data;

	return (void *)to + 6 <= (void *)(long)skb->data_end && to[0] == 0x01 && to[1] == 0x80 && to[2] == 0xc2 && !to[3] && !to[4] && to[5] < 16;
}

enum { IN_VLAN = -4 };

/* IN_VLAN: it was in this VLAN, and has its tag no more. What is in another one is not for us, but for what interface the machine
 * has there. What is in none, also by id 0 (a priority, 802.1Q table 9-2), would be in two at once. */
ONCE int untag(struct __sk_buff *skb, u32 vlan)
{
	u32 tag = outermost(skb);

	if (LIKELY((tag & ~0xf000) == vlan)) {
		if (bpf_skb_vlan_pop(skb))
			return drop(skb, 0, REASON_ERROR);
		/* A second tag would be Linux's own affair, and name another VLAN of this NIC to it. */
		return outermost(skb) ? drop(skb, 0, REASON_OTHER_VLAN) : IN_VLAN;
	}
	if (tag & TAG_ID || is_for_link(skb))
		return TC_ACT_NEXT;
	return drop(skb, 0, REASON_OTHER_VLAN);
}

/* What has a tag already is of an interface that the machine has in another VLAN. */
SEC("tc") int tag(struct __sk_buff *skb)
{
	u32 zero = 0;
	struct self *me = bpf_map_lookup_elem(&self, &zero);

	if (!me || !me->vlan || outermost(skb) || is_for_link(skb))
		return TC_ACT_NEXT;
	if (bpf_skb_vlan_push(skb, swap16(me->vlan >> 16), me->vlan & TAG_ID))
		return drop(skb, 0, REASON_ERROR);
	return TC_ACT_NEXT;
}
