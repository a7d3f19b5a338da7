/* What the kernel gives to BPF programs: the types and helpers that nestnet uses, from the stable
 * UAPI (linux/bpf.h). Written out here so that building needs no kernel headers. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#define NULL ((void *)0)
#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
/* Not inlined and not static: the verifier looks at it once, not once for every path to it. */
#define ONCE __attribute__((noinline))
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

/* Map definitions that libbpf reads from BTF. */
#define __uint(name, val) int(*name)[val]
#define __type(name, val) __typeof__(val) *name

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_RINGBUF = 27,

	BPF_F_NO_PREALLOC = 1,
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_EXIST = 2,

	BPF_ADJ_ROOM_MAC = 1,
	BPF_F_ADJ_ROOM_FIXED_GSO = 1 << 0,
	BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 = 1 << 1,
	BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 = 1 << 2,
	BPF_F_ADJ_ROOM_ENCAP_L4_UDP = 1 << 4,
	BPF_F_ADJ_ROOM_ENCAP_L2_ETH = 1 << 6,
	BPF_F_ADJ_ROOM_DECAP_L3_IPV4 = 1 << 7,
	BPF_F_ADJ_ROOM_DECAP_L3_IPV6 = 1 << 8,
#define BPF_F_ADJ_ROOM_ENCAP_L2(len) (((u64)(len) & 0xff) << 56)

	BPF_F_PSEUDO_HDR = 1 << 4,
	BPF_FIB_LKUP_RET_SUCCESS = 0,
	BPF_FIB_LKUP_RET_NO_NEIGH = 7,

	TC_ACT_OK = 0,
	TC_ACT_SHOT = 2,
	TC_ACT_NEXT = -1, /* tcx: on to the next program, in the end to the machine's own stack */

	PACKET_HOST = 0,
	AF_INET = 2,
	AF_INET6 = 10,
};

struct __sk_buff {
	u32 len, pkt_type, mark, queue_mapping, protocol, vlan_present, vlan_tci, vlan_proto, priority;
	u32 ingress_ifindex, ifindex, tc_index, cb[5], hash, tc_classid, data, data_end, napi_id;
	u32 family, remote_ip4, local_ip4, remote_ip6[4], local_ip6[4], remote_port, local_port, data_meta;
	u64 flow_keys __attribute__((aligned(8)));
	u64 tstamp;
	u32 wire_len, gso_segs;
	u64 sk __attribute__((aligned(8)));
	u32 gso_size;
	u8 tstamp_type;
	u32 : 24;
	u64 hwtstamp;
};

struct bpf_fib_lookup {
	u8 family, l4_protocol;
	u16 sport, dport, tot_len;
	u32 ifindex;
	u32 tos_or_flowinfo;
	u32 source[4];
	u32 target[4];
	u16 vlan_proto, vlan_tci;
	u8 smac[6], dmac[6];
};

struct bpf_redir_neigh {
	u32 nh_family;
	u32 ipv4_nh[4];
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static u32 (*bpf_get_smp_processor_id)(void) = (void *)8;
static long (*bpf_skb_store_bytes)(struct __sk_buff *, u32 offset, const void *from, u32 len, u64 flags) = (void *)9;
static long (*bpf_l3_csum_replace)(struct __sk_buff *, u32 offset, u64 from, u64 to, u64 size) = (void *)10;
static long (*bpf_l4_csum_replace)(struct __sk_buff *, u32 offset, u64 from, u64 to, u64 flags) = (void *)11;
static long (*bpf_clone_redirect)(struct __sk_buff *, u32 ifindex, u64 flags) = (void *)13;
static long (*bpf_skb_vlan_push)(struct __sk_buff *, u16 protocol, u16 tci) = (void *)18; /* protocol: network order */
static long (*bpf_skb_vlan_pop)(struct __sk_buff *) = (void *)19;
static long (*bpf_redirect)(u32 ifindex, u64 flags) = (void *)23;
static long (*bpf_skb_load_bytes)(const struct __sk_buff *, u32 offset, void *to, u32 len) = (void *)26;
static s64 (*bpf_csum_diff)(void *from, u32 from_size, void *to, u32 to_size, u32 seed) = (void *)28;
static long (*bpf_skb_change_type)(struct __sk_buff *, u32 type) = (void *)32;
static long (*bpf_skb_change_tail)(struct __sk_buff *, u32 len, u64 flags) = (void *)38;
static long (*bpf_skb_pull_data)(struct __sk_buff *, u32 len) = (void *)39;
static long (*bpf_skb_adjust_room)(struct __sk_buff *, int len_diff, u32 mode, u64 flags) = (void *)50;
static long (*bpf_fib_lookup)(void *ctx, struct bpf_fib_lookup *, int size, u32 flags) = (void *)69;
static void *(*bpf_ringbuf_reserve)(void *ring, u64 size, u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *data, u64 flags) = (void *)132;
static long (*bpf_redirect_neigh)(u32 ifindex, struct bpf_redir_neigh *, int size, u64 flags) = (void *)152;
static long (*bpf_redirect_peer)(u32 ifindex, u64 flags) = (void *)155;
static u64 (*bpf_ktime_get_coarse_ns)(void) = (void *)160;
static long (*bpf_loop)(u32 count, void *callback, void *context, u64 flags) = (void *)181;

#define memcpy(to, from, size) __builtin_memcpy(to, from, size)
#define memset(to, byte, size) __builtin_memset(to, byte, size)

INLINE u16 swap16(u16 x) { return __builtin_bswap16(x); }
INLINE u32 swap32(u32 x) { return __builtin_bswap32(x); }
/* Fields in frames and rows, read and written whole. Compilers take bytes for unaligned, and go one by one. */
typedef u16 __attribute__((may_alias)) any16;
typedef u32 __attribute__((may_alias)) any32;
typedef u64 __attribute__((may_alias)) any64;
/* As functions, for a compiler that sees through a cast takes the bytes again. */
INLINE any16 *word16(const void *p) { return (any16 *)p; }
INLINE any32 *word32(const void *p) { return (any32 *)p; }
INLINE any64 *word64(const void *p) { return (any64 *)p; }
#define WORD16(p) (*word16(p))
#define WORD32(p) (*word32(p))
#define WORD64(p) (*word64(p))

INLINE u16 load16(const u8 *p) { return (u16)(p[0] << 8 | p[1]); } /* a big-endian field */
