/* What the datapath remembers by itself: flows, carriage, connections, fragments, and what it counts. */
#pragma once
#include "tables.h"

/* Mirrors model/connections.py. Seconds. */
enum { TCP_SECONDS = 7200, TCP_CLOSING_SECONDS = 10, OTHER_SECONDS = 180, FRAGMENT_SECONDS = 30 };

struct tuple {
	struct address source, target;
	u16 source_port, target_port; /* host order; ICMP echo: the identifier twice */
	u8 protocol, family;          /* family 4 or 6 */
	u16 vlan;                     /* of a flow: the id of the tag that its frames bear on a trunk, or RIDES; else 0 */
};
#define RIDES 0x8000 /* behind tags in a transparent segment, whichever */

/* A flow is one direction of a conversation as it enters here, composed: everything that the full
 * path found out, with the counters it was built from (rule 17). It may be lost at any time. */
struct flow_key {
	struct tuple tuple;
	u32 where; /* ifindex of a workload, or FROM_WIRE | VNI, or FROM_WIRE | FROM_VLAN | segment */
};
#define FROM_WIRE 0x80000000u
#define FROM_VLAN 0x40000000u

enum { TO_WORKLOAD = 1, TO_WIRE = 2, TO_TAP = 3, TO_VLAN = 4 };
enum { UNTRACKED = 0, FORWARD = 1, REPLY = 2 };

/* What goes in front of a frame: Ethernet 14, IPv4 20 or IPv6 40, UDP 8, VXLAN 8. */
#define OUTER4 50
#define OUTER6 70

/* What a packet pays on its way (rule 8): each time its bytes and those above it at that level, from a bucket. */
#define PATH_BUCKETS 8
struct toll { u32 bucket; u16 above, pad; };
struct tolls { struct toll each[PATH_BUCKETS]; };

struct flow {
	u64 epoch, sum; /* sum of all counters it was built from: they only rise, so equal sums are equal counters */
	u32 seen;           /* seconds; also when the connection was last told */
	u32 ifindex;
	u32 source, target; /* ports */
	u8 out;             /* TO_ */
	u8 hops, tracked, tolls; /* hops: routers on the way, 0 if it is switched; tolls: how many buckets it pays */
	u16 mtu;
	u16 tag;            /* the id of the tag that frames get for their trunk, or their VLAN; 0: none */
	u8 came[12];        /* destination and source MAC it must come with */
	u8 outer_bytes;     /* OUTER4 or OUTER6, as the machines' addresses are */
	u8 pad;
	u16 outer_sum;      /* checksum of the outer IPv4 header without what is filled in, not folded in yet */
	u32 leaving;        /* how many of its tolls are the sender's; behind them are those of the receiver */
	/* What goes in front: the last bytes of `outer`, then the frame's own header. It is written in whole words, from here
	 * (OUTER6) or 20 bytes on (OUTER4). Lengths, checksum and ECN are filled in for each packet. */
	u8 outer[OUTER6];
	u8 leaves[12];      /* destination and source MAC it leaves with */
	u16 ether_type;     /* network order */
	struct address sender; /* that VXLAN must come from; none for a workload */
	u32 network;
	u32 a, b;           /* hosts: the carriage entry */
	u32 pad2;
	struct tolls toll;
};

/* How host a reaches host b: the walk down the carriers, with all levels' counters in one sum. */
struct carriage_key { u32 a, b, family; };
struct carriage {
	u64 epoch, sum;
	u32 reason; /* 0: it may */
	u32 machine; /* slot, 0 if it never leaves this machine */
};

/* A connection, as its opener saw it. The agent alone deletes. */
struct connection_key {
	u32 source, target; /* ports */
	struct tuple tuple;
};
struct connection {
	u64 sum; /* of the counters its opener was last judged by */
	u32 seen;
	u32 closing;
};

struct fragment_key {
	u32 port;
	struct address source, target;
	u32 id, protocol;
};
struct fragment {
	u16 source_port, target_port;
	u32 type; /* of ICMP */
	u32 seen;
};

struct drops_key { u32 port, reason; };
struct stats { u64 out_packets, out_bytes, in_packets, in_bytes; }; /* out: from the workload */
struct composed { u64 flows, carriages; }; /* how often one was composed, at first or again */

#define STATE(name_, type_, flags_, size_, key_, value_) \
	struct { __uint(type, type_); __uint(max_entries, size_); __uint(map_flags, flags_); \
		 __type(key, key_); __type(value, value_); } name_ SEC(".maps")

STATE(flow, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, 4096, struct flow_key, struct flow);
STATE(carriage, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, 4096, struct carriage_key, struct carriage);
STATE(connection, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, 4096, struct connection_key, struct connection);
STATE(fragment, BPF_MAP_TYPE_LRU_HASH, 0, 4096, struct fragment_key, struct fragment);
STATE(drops, BPF_MAP_TYPE_HASH, BPF_F_NO_PREALLOC, 4096, struct drops_key, u64);
STATE(stats, BPF_MAP_TYPE_PERCPU_ARRAY, 0, 1024, u32, struct stats);
STATE(composed, BPF_MAP_TYPE_PERCPU_ARRAY, 0, 1, u32, struct composed);
/* Connections a port opened here, ever, and those of them the agent has swept: the rest is its share. */
COUNTER(opened, 1024);
COUNTER(closed, 1024);
/* Flows that are kept for a port: those of connections that it opened, in both directions, and what it sends untracked. A
 * port has room for two for each connection that it may have; the rest of its packets take the long way, and hurt nobody
 * else. Raised here; each sweep of the agent says how many there are. */
COUNTER(kept, 1024);
/* What routers tell each port: a bucket (rates.h). */
COUNTER(told, 1024);
/* The bucket of what a port asks of its machine (inquiry.h). */
COUNTER(asked, 1024);
/* What is in a bucket: the moment from which it is not empty, in ns. */
COUNTER(until, 1024);

/* What the agent is asked. Under test (`recording`) nothing is sent, and what would be is written here too. */
enum { RECORD_WORKLOAD = 1, RECORD_WIRE = 2, RECORD_DROP = 3, RECORD_COMPOSED = 4, RECORD_ASKED = 5, RECORD_RELAYED = 6, RECORD_VLAN = 7 };
#define RECORD_BYTES 2048
struct record {
	u32 kind;
	u32 slot;   /* port, or machine */
	u32 what;   /* ifindex, or reason */
	u32 length; /* of the frame; `data` has at most RECORD_BYTES of it */
	u8 data[RECORD_BYTES];
};
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 1 << 20); } emitted SEC(".maps");
volatile const u32 recording = 0;

/* Is the machine the workload of a host port (out.h)? */
volatile const u32 on_port = 0;

/* Under test (`driven`) it is the time that stands here: ns, of a clock that never goes back. */
COUNTER(clock, 1);
volatile const u32 driven = 0;
