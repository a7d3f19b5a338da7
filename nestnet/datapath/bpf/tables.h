/* The tables: the same structs in the same order as compile/tables.py says, which a test compares
 * by BTF. Then the datapath's own state. All integers little-endian unless a comment says otherwise;
 * addresses are 16 bytes in network order, IPv4 as ::ffff:a.b.c.d. */
#pragma once
#include "bpf.h"

/* Mirror model/values.py. */
#define MAX_DEPTH 64
#define MAX_HOPS 63

enum { ENABLED = 1, LOCAL = 2, HOSTS = 4, TAP = 8, AGENT = 16, TRUNK = 32 }; /* port.flags: HOSTS has a row in host; network.flags has ENABLED */
enum { RATED = 2 };                             /* network.flags */
enum { TRANSPARENT = 1, ON_VLAN = 2 };          /* segment.flags */
enum { KIND_MACHINE = 1, KIND_PORT = 2 };       /* host.kind */
enum { OWNER_PORT = 1, OWNER_ROUTER = 2 };      /* owner.kind, mac.kind */
#define IDENTITY 0x40000000u
#define CIDR 0x80000000u
#define PROTOCOL 0x40000000u
#define CLASS 0x80000000u
#define DENY 1u

struct address {
	union {
		u8 bytes[16];
		u32 words[4]; /* network order */
	};
};

struct network { u64 id; u32 rules, combos, flags, mtu, underlay, pad; };
struct segment { u64 id; u32 network, vni, flood, floods, local, locals, router, flags, ifindex; u8 mac[6]; u16 vlan; u32 pad; };
struct router { u64 id; u32 network, pad; u8 address4[16], address6[16]; u8 mac[6]; u16 pad2; };
struct port {
	u64 id;
	u32 network, segment, host, ifindex, flags, share, out, in;
	u8 address4[16], address6[16];
	u8 mac[6];
	u16 tag;
};
struct host { u64 id; u32 kind, port, at, from; };
struct machine { u64 id; u8 address[16]; u32 mtu, pad; };

struct attach_key { u32 ifindex, tag; };
struct attach { u32 port; };
struct vni_key { u32 vni; };
struct vni { u32 segment; };
struct vlan_key { u32 ifindex, id; };
struct vlan { u32 segment; };
struct member_key { u8 address[16]; };
struct member { u32 machine; };
struct mac_key { u32 segment; u8 mac[6]; u16 pad; };
struct mac { u32 kind, slot; };
struct owner_key { u32 prefixlen, segment; u8 address[16]; };
struct owner { u32 kind, slot; };
struct route_key { u32 prefixlen, router; u8 address[16]; };
struct route { u32 segment, group, count, hops; };
struct hop_key { u32 router, group, index; };
struct hop { u32 next, bucket; };
struct face_key { u32 router, segment; };
struct face { u8 address4[16], address6[16]; };
struct flood_key { u32 segment, version, index; };
struct flood { u32 host; };
struct local_key { u32 segment, version, index; };
struct local { u32 port; };
struct peer_key { u32 network, rules, port; };
struct peer { u32 class; };
struct cidr_key { u32 prefixlen, network, rules; u8 address[16]; };
struct cidr { u32 class; };
struct service_key { u32 prefixlen, network, rules; u8 protocol, port_be[2], pad; };
struct service { u32 class; };
struct rule_key { u32 network, rules, source, target, service; };
struct rule { u64 id; u32 rank, pad; };
struct bucket { u64 id, rate, burst; u32 kind, pad; };
struct self { u32 machine, ifindex, vlan; };

/* max_entries here are for the smallest machine; the loader sets them (Capacity in kernel.py). */
#define TABLE_ARRAY(name_, size_) \
	struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, size_); __type(key, u32); __type(value, struct name_); } name_ SEC(".maps")
#define TABLE_KEYED(name_, type_, size_) \
	struct { __uint(type, type_); __uint(max_entries, size_); __uint(map_flags, BPF_F_NO_PREALLOC); \
		 __type(key, struct name_##_key); __type(value, struct name_); } name_ SEC(".maps")
#define TABLE_HASH(name_, size_) TABLE_KEYED(name_, BPF_MAP_TYPE_HASH, size_)
#define TABLE_LPM(name_, size_) TABLE_KEYED(name_, BPF_MAP_TYPE_LPM_TRIE, size_)

TABLE_ARRAY(network, 1024);
TABLE_ARRAY(segment, 1024);
TABLE_ARRAY(router, 1024);
TABLE_ARRAY(port, 1024);
TABLE_ARRAY(host, 1024);
TABLE_ARRAY(machine, 1024);
TABLE_ARRAY(bucket, 1024);
TABLE_ARRAY(self, 1);
TABLE_HASH(attach, 1024);
TABLE_HASH(vni, 1024);
TABLE_HASH(vlan, 1024);
TABLE_HASH(member, 1024);
TABLE_HASH(mac, 4096);
TABLE_LPM(owner, 4096);
TABLE_LPM(route, 4096);
TABLE_HASH(hop, 4096);
TABLE_HASH(face, 4096);
TABLE_HASH(flood, 4096);
TABLE_HASH(local, 4096);
TABLE_HASH(peer, 4096);
TABLE_LPM(cidr, 4096);
TABLE_LPM(service, 4096);
TABLE_HASH(rule, 4096);

/* Generation counters (rule 16), one u64 for each slot: the agent alone raises them. */
#define COUNTER(name_, size_) \
	struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, size_); __type(key, u32); __type(value, u64); } name_ SEC(".maps")

COUNTER(generation_port, 1024);
COUNTER(generation_policy, 1024);
COUNTER(generation_route, 1024);
COUNTER(generation_flood, 1024);
COUNTER(generation_host, 1024);
COUNTER(generation_machine, 1024);
COUNTER(epoch, 1);
