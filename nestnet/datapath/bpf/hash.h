/* The flow hash (rule 7): the same as model/hash.py, on every machine and every boot. */
#pragma once
#include "state.h"

#define FIRST_SOURCE_PORT 49152
#define SOURCE_PORTS 16384
#define CARRIAGE_PORT 4789

INLINE u32 mix(u32 h, u32 word)
{
	h = (h ^ word) * 0x9E3779B1u;
	return h ^ h >> 15;
}

INLINE u32 flow_hash(const struct tuple *t, int ports, u32 seed)
{
	u32 h = seed ^ 0x811C9DC5u;

	for (int i = 0; i < 4; i++)
		h = mix(h, swap32(t->source.words[i]));
	for (int i = 0; i < 4; i++)
		h = mix(h, swap32(t->target.words[i]));
	h = mix(h, ports ? (u32)t->source_port << 16 | t->target_port : 0);
	h = mix(h, t->protocol);
	h *= 0x85EBCA6Bu;
	return h ^ h >> 13;
}

/* A frame that is VXLAN itself hands its source port on, so that depth loses no entropy. */
INLINE u16 outer_source_port(const struct tuple *t, int ports)
{
	if (ports && t->protocol == 17 && t->target_port == CARRIAGE_PORT && t->source_port >= FIRST_SOURCE_PORT)
		return t->source_port;
	return FIRST_SOURCE_PORT + flow_hash(t, ports, 0) % SOURCE_PORTS;
}
