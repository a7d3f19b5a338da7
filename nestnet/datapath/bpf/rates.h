/* Rate limits: a bucket is the moment from which it is not empty any more (model/rates.py has the picture). */
#pragma once
#include "lookup.h"

#define SPEND_TRIES 8 /* other CPUs may spend from it at the same moment */

/* 1 if a packet of this cost passes; then the bucket has paid for it. All in ns. */
INLINE int spend(u64 *until, u64 cost, u64 burst, u64 now)
{
	u64 full = now > burst ? now - burst : 0;

	for (int i = 0; i < SPEND_TRIES; i++) {
		u64 was = *(volatile u64 *)until;

		if (was > now)
			return 0;
		if (__sync_val_compare_and_swap(until, was, (was > full ? was : full) + cost) == was)
			return 1;
	}
	/* So many at once: it has just been filled up to now, and only needs to pay. */
	__sync_fetch_and_add(until, cost);
	return 1;
}

/* One packet as the wire will see it: of a GSO packet, its segments. `headers`: of IP and what is in it. */
struct wire_bytes { u64 bytes, packets; };

INLINE struct wire_bytes wire_bytes(struct __sk_buff *skb, u32 length, u32 headers)
{
	struct wire_bytes w = { length, 1 };

	headers += 14;
	if (skb->gso_size && length > headers) {
		w.packets = (length - headers + skb->gso_size - 1) / skb->gso_size;
		w.bytes += (w.packets - 1) * headers;
	}
	return w;
}

#define SECOND 1000000000ull

/* Pays from the buckets `first` to before `end`, in turn. What was paid stays paid when one is empty: then the reason.
 * `range` is first | end << 16, `length` and `headers` those of the frame at its own network. */
ONCE int pay(struct __sk_buff *skb, struct tolls *tolls, u32 range, u32 length, u32 headers)
{
	struct wire_bytes w = wire_bytes(skb, length, headers);
	u64 now = now_ns();

	if (!tolls)
		return REASON_ERROR;
	for (u32 i = 0; i < PATH_BUCKETS; i++) {
		u32 slot = tolls->each[i].bucket, above = tolls->each[i].above;
		struct bucket *row;
		u64 *left, cost;

		if (i < (range & 0xffff) || i >= range >> 16)
			continue;
		row = bpf_map_lookup_elem(&bucket, &slot);
		left = bpf_map_lookup_elem(&until, &slot);
		if (!row || !left || !row->rate)
			continue;
		cost = ((w.bytes + w.packets * above) * 8 * SECOND + row->rate - 1) / row->rate;
		if (!spend(left, cost, row->burst, now))
			return above ? REASON_CARRIER_RATE : REASON_RATE;
	}
	return 0;
}
