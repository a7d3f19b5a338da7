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
