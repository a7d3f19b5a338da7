/* 802.1Q and 802.1ad tags. The program sees every frame without them: it takes them off where they come in and puts them
 * on where they leave.
 *
 *     of a trunk               the port behind it is known by the tag, which ends here
 *     in a transparent segment they ride along: kept in `p->tag`, and in VXLAN in front of the EtherType
 *
 * What comes from a link has its outermost tag beside the bytes (skb->vlan_present), what is in VXLAN, and what a test
 * run makes, has all of them in the bytes. */
#pragma once
#include "packet.h"

#define TAG_BYTES 4

/* The outermost tag: EtherType << 16 | priority and id; 0: none. */
INLINE u32 outermost(struct __sk_buff *skb)
{
	u8 bytes[6]; /* with the EtherType behind it */

	if (skb->vlan_present)
		return (u32)swap16(skb->vlan_proto) << 16 | (skb->vlan_tci & 0xffff);
	/* Cheap for what has none: the kernel has read the EtherType. */
	if (!is_tag(swap16(skb->protocol)) || load(skb, 12, bytes, sizeof(bytes)) || !is_tag(load16(bytes)))
		return 0;
	return (u32)load16(bytes) << 16 | load16(bytes + 2);
}

/* As many as may ride along. */
ONCE int take_tags(struct __sk_buff *skb, struct packet *p)
{
	if (!p)
		return 0;
	for (u32 i = 0; i < RIDING; i++) {
		u32 tag = outermost(skb);

		if (!tag || bpf_skb_vlan_pop(skb))
			break;
		p->tag[i] = tag;
		p->tags = i + 1;
	}
	return 0;
}

/* The tags of a frame that begins at `at`, as many as may ride along. */
ONCE int read_tags(struct __sk_buff *skb, struct packet *p, u32 at)
{
	u8 bytes[6];

	if (!p)
		return 0;
	for (u32 i = 0; i < RIDING; i++, at += TAG_BYTES) {
		if (load(skb, at + 12, bytes, sizeof(bytes)) || !is_tag(load16(bytes)))
			break;
		p->tag[i] = (u32)load16(bytes) << 16 | load16(bytes + 2);
		p->tags = i + 1;
	}
	return 0;
}

INLINE int put_tag(struct __sk_buff *skb, u32 tag)
{
	return bpf_skb_vlan_push(skb, swap16(tag >> 16), tag & 0xffff);
}

/* Those that ride along, in front of them the port's own. */
ONCE int put_tags(struct __sk_buff *skb, struct packet *p, u32 own)
{
	if (!p)
		return 0;
	for (int i = RIDING - 1; i >= 0; i--)
		if (i < p->tags)
			put_tag(skb, p->tag[i]);
	if (own)
		put_tag(skb, (u32)ETH_VLAN << 16 | own);
	return 0;
}

/* Off again, from what was only copied. */
ONCE int drop_tags(struct __sk_buff *skb, struct packet *p, u32 own)
{
	u32 count = p ? p->tags + !!own : 0;

	for (u32 i = 0; i <= RIDING; i++)
		if (i < count)
			bpf_skb_vlan_pop(skb);
	return 0;
}

/* Into the bytes, at the EtherType of the frame that begins at `at`. There is room. */
ONCE int write_tags(struct __sk_buff *skb, struct packet *p, u32 at)
{
	u8 bytes[RIDING * TAG_BYTES + 2];

	if (!p || !p->tags)
		return 0;
	for (u32 i = 0; i < RIDING; i++) {
		u32 tag = p->tag[i];

		bytes[i * TAG_BYTES] = tag >> 24;
		bytes[i * TAG_BYTES + 1] = tag >> 16;
		bytes[i * TAG_BYTES + 2] = tag >> 8;
		bytes[i * TAG_BYTES + 3] = tag;
	}
	if (p->tags == 1) {
		bytes[TAG_BYTES] = p->ether_type >> 8;
		bytes[TAG_BYTES + 1] = p->ether_type;
		return bpf_skb_store_bytes(skb, at, bytes, TAG_BYTES + 2, 0) ? REASON_ERROR : 0;
	}
	bytes[2 * TAG_BYTES] = p->ether_type >> 8;
	bytes[2 * TAG_BYTES + 1] = p->ether_type;
	return bpf_skb_store_bytes(skb, at, bytes, 2 * TAG_BYTES + 2, 0) ? REASON_ERROR : 0;
}

/* Linux makes room in front of IP alone, and gives who receives a frame what it holds its EtherType for. No helper says
 * that to it, but one that takes a tag out of the bytes reads it there. */
ONCE int become(struct __sk_buff *skb, u32 ether_type)
{
	u16 field = swap16(ether_type);
	u32 tag = (u32)ETH_VLAN << 16 | 1;

	return bpf_skb_store_bytes(skb, 12, &field, 2, 0) || put_tag(skb, tag) || put_tag(skb, tag) || bpf_skb_vlan_pop(skb) ||
	       bpf_skb_vlan_pop(skb);
}

/* Bytes of the tags that ride along. */
INLINE u32 tag_bytes(const struct packet *p) { return p->tags * TAG_BYTES; }
