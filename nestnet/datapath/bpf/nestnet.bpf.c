/* nestnet's datapath: programs on the ingress of every workload's link, of the underlay's NIC and of those of trunks; and `tag`
 * in vlan.h.
 *
 *     workload:  known? -> out.   Otherwise: guard, answers, where to, whether, carriage -> flow -> out
 *     underlay:  known? -> in.    Otherwise: member, VNI, guard, whether, carriage -> flow -> in
 *     trunk:     known? -> in.    Otherwise: guard, whether, carriage -> flow -> in
 *
 * Read docs/datapath.md first: every check and every drop here is a line there, in the same order.
 */
#include "flood.h"
#include "icmp.h"
#include "inquiry.h"
#include "vlan.h"

/* Line 9 and 10: whose frame it is. Reads rows only, so that it can be asked twice. */
enum { NOBODY = 0, SWITCHED, ROUTED, GATEWAY, ROUTER, NO_ROUTE_TO, NOBODY_THERE, HAIRPIN };

ONCE int resolve(struct packet *p)
{
	struct mac *found;
	struct owner *there;
	struct router *r;

	if (!p)
		return NOBODY;
	p->target = p->first = p->router = p->hops = p->arrived = 0;
	p->target_segment = p->segment;
	memcpy(p->leaves, p->came, 12);
	found = mac_of(p->segment, p->came);
	if (!found)
		return NOBODY;
	if (found->kind == OWNER_PORT) {
		p->target = found->slot;
		return p->target == p->source ? HAIRPIN : SWITCHED;
	}
	p->first = p->router = found->slot;
	/* Its own address in this very segment may be link-local, so it is looked for before routes are. */
	there = owner_of(p->segment, &p->tuple.target);
	if (there && there->kind == OWNER_ROUTER && there->slot == p->router)
		return GATEWAY;
	p->target_segment = route_of(p->router, &p->tuple.target);
	if (!p->target_segment)
		return NO_ROUTE_TO;
	bpf_loop(WAY, step_on, NULL, 0);
	if (!p->arrived && p->hops < WAY)
		return NO_ROUTE_TO;
	there = owner_of(p->target_segment, &p->tuple.target);
	if (!there)
		return NOBODY_THERE;
	if (there->kind == OWNER_ROUTER)
		return ROUTER;
	p->target = there->slot;
	r = bpf_map_lookup_elem(&router, &p->router);
	struct port *q = bpf_map_lookup_elem(&port, &p->target);

	if (!r || !q)
		return NOBODY_THERE;
	memcpy(p->leaves, q->mac, 6);
	memcpy(p->leaves + 6, r->mac, 6);
	return ROUTED;
}

/* Lines 9 to 11: 0 if there is a port it may go to, or it was answered. */
ONCE int decide(struct __sk_buff *skb, struct packet *p)
{
	int where;
	struct port *q;

	if (!p)
		return REASON_ERROR;
	where = resolve(p);
	p->sum += COUNTER_OF(port, p->target);
	where = resolve(p);
	switch (where) {
	case NOBODY:
		return REASON_UNKNOWN_UNICAST;
	case HAIRPIN:
		return REASON_HAIRPIN;
	case SWITCHED:
	case ROUTED:
		if (p->tags && p->first)
			return REASON_TAGGED;
		if (where == ROUTED && passes_no_router(&p->tuple))
			return REASON_SOURCE_ADDRESS;
		q = bpf_map_lookup_elem(&port, &p->target);
		if (!q || !(q->flags & ENABLED))
			return REASON_PORT_DISABLED;
		p->b = place_of(q);
		return track(skb, p);
	case GATEWAY:
	case ROUTER:
		if (p->tags)
			return REASON_TAGGED;
		if (where == ROUTER && !may(p))
			return REASON_POLICY;
		if (where == ROUTER && ((p->hops > 1 && p->ttl < p->hops) || !p->arrived))
			return REASON_TTL_EXPIRED;
		/* A later fragment has no code: its first one had none either, or was not answered. */
		if (p->icmp_kind == ICMP_ECHO && p->icmp_type == (p->tuple.family == 4 ? 8 : 128) && !p->icmp_code) {
			remember_fragment(p);
			return answer_echo(skb, p);
		}
		return where == GATEWAY && !may(p) ? REASON_POLICY : REASON_ROUTER_LOCAL;
	default:
		if (p->tags)
			return REASON_TAGGED;
		if (!may(p))
			return REASON_POLICY;
		if (where == NO_ROUTE_TO)
			return REASON_NO_ROUTE;
		return p->ttl <= p->hops ? REASON_TTL_EXPIRED : REASON_UNREACHABLE;
	}
}

/* What was found out becomes a flow, if its next packet could be one of the usual ones. */
INLINE int is_cacheable(const struct packet *p)
{
	return p->fragment == WHOLE && (p->tuple.protocol == TCP || p->tuple.protocol == UDP || p->icmp_kind == ICMP_ECHO) &&
	       !(p->tcp_flags & (FIN | RST));
}

ONCE int keep(struct packet *p, struct flow *f, u32 mtu)
{
	struct flow_key key = {};
	u32 opener;
	u64 *has;
	struct port *row;

	if (!p || !f)
		return 0;
	key.where = p->where;
	key.tuple = p->tuple;
	key.tuple.vlan = p->tags ? RIDES : p->vlan;
	f->epoch = p->epoch;
	f->sum = p->sum + p->way.sum;
	f->source = p->source;
	f->target = p->target;
	f->network = p->network;
	f->a = p->a;
	f->b = p->b;
	f->seen = p->now;
	f->sender = p->sender_address;
	f->hops = p->hops;
	f->tracked = p->tracked;
	f->mtu = mtu;
	memcpy(f->came, p->came, 12);
	count_composed(0);
	opener = f->tracked == REPLY ? f->target : f->source;
	has = bpf_map_lookup_elem(&kept, &opener);
	row = bpf_map_lookup_elem(&port, &opener);
	if (has && row && *has < 2 * (u64)row->share && !bpf_map_update_elem(&flow, &key, f, BPF_NOEXIST))
		__sync_fetch_and_add(has, 1);
	else
		bpf_map_update_elem(&flow, &key, f, BPF_EXIST);
	return 0;
}

/* Lines 12 to 14, behind `decide`: out to the workload or the wire. */
ONCE int forward(struct __sk_buff *skb, struct packet *p, u32 mtu, u32 family)
{
	u32 zero = 0, length = skb->len - ETH_BYTES, headers, tags;
	struct flow *f = bpf_map_lookup_elem(&composing, &zero);
	struct path *pays = bpf_map_lookup_elem(&paying, &zero);
	struct self *me = bpf_map_lookup_elem(&self, &zero);
	struct port *q;
	struct segment *s;
	int reason, next_hop = HAS_NEIGHBOUR;
	u32 stacked;

	if (!p)
		return TC_ACT_SHOT;
	q = bpf_map_lookup_elem(&port, &p->target);
	s = bpf_map_lookup_elem(&segment, &p->target_segment);
	if (!f || !pays || !me || !q || !s)
		return drop(skb, p->source, REASON_ERROR);
	if (!p->narrow && s->flags & TRANSPARENT)
		mtu -= RIDING_BYTES;
	headers = header_bytes(skb, p);
	tags = tag_bytes(p);
	/* The first router looks at the TTL, then at the size; those behind it at the TTL alone: one MTU is everywhere. */
	if (p->hops && p->ttl <= 1)
		return refused(skb, p, REASON_TTL_EXPIRED, mtu);
	if (too_long(skb, length, headers, mtu))
		return refused(skb, p, REASON_TOO_BIG, mtu);
	if (p->hops && p->ttl <= p->hops)
		return refused(skb, p, REASON_TTL_EXPIRED, mtu);
	reason = carry(p->a, p->b, family, p->epoch, &p->way);
	if (reason)
		return drop(skb, p->source, reason);
	memset(f, 0, sizeof(*f));
	memcpy(f->leaves, p->leaves, 12);
	f->ether_type = swap16(p->ether_type);
	if (!p->way.machine || p->way.machine == me->machine) {
		f->out = q->flags & TAP ? TO_TAP : TO_WORKLOAD;
		f->ifindex = q->ifindex;
		f->tag = q->tag;
		if (!q->ifindex)
			return drop(skb, p->source, REASON_NOT_ATTACHED);
	} else if (s->flags & ON_VLAN) {
		f->out = TO_VLAN;
		f->ifindex = s->ifindex;
		f->tag = s->vlan;
		if (!s->ifindex)
			return drop(skb, p->source, REASON_NO_TRUNK);
		/* A router's MAC is the same on all machines: switches would see it move. */
		if (p->hops)
			memcpy(f->leaves + 6, s->mac, 6);
	} else {
		u16 from = outer_source_port(&p->tuple, p->fragment == WHOLE);

		f->out = TO_WIRE;
		next_hop = outer_header(skb, f, p->way.machine, s->vni, from);
		if (next_hop == NO_ROUTE)
			return drop(skb, p->source, REASON_NO_UNDERLAY_ROUTE);
	}
	reason = find_tolls(p, p->b, LEAVES | OWN);
	if (reason)
		return drop(skb, p->source, reason);
	keep_tolls(f, pays, f->out != TO_WIRE && f->out != TO_VLAN);
	if (f->leaving) {
		reason = pay(skb, &f->toll, f->leaving << 16, skb->len + tags, headers + tags);
		if (reason)
			return drop(skb, p->source, reason);
	}
	remember(p);
	remember_fragment(p);
	if (recording)
		record(skb, RECORD_COMPOSED, p->source, 0);
	if (next_hop == HAS_NEIGHBOUR && is_cacheable(p))
		keep(p, f, mtu);
	count_out(p->source, skb->len + tags);
	if (f->out != TO_WIRE) {
		if (f->leaving < f->tolls) {
			reason = pay(skb, &f->toll, f->leaving | f->tolls << 16, skb->len + tags, headers + tags);
			if (reason)
				return drop(skb, p->target, reason);
		}
		if (p->hops) {
			bpf_skb_store_bytes(skb, 0, f->leaves, 12, 0);
			take_hops(skb, ETH_BYTES, p->tuple.family, p->ttl, p->hops);
		}
		if (f->out == TO_VLAN)
			return to_vlan(skb, p->source, f->ifindex, f->tag);
		put_tags(skb, p, 0);
		return to_workload(skb, p->target, f->ifindex, f->out == TO_TAP, f->tag);
	}
	stacked = skb->gso_size && is_carriage(&p->tuple) ? headers : 0;
	if (p->tags ? encapsulate_tagged(skb, f, p, stacked) : encapsulate(skb, f, p->ecn, stacked))
		return drop(skb, p->source, REASON_ERROR);
	if (p->hops)
		take_hops(skb, f->outer_bytes + ETH_BYTES, p->tuple.family, p->ttl, p->hops);
	if (recording) {
		record(skb, RECORD_WIRE, p->way.machine, f->ifindex);
		return TC_ACT_SHOT;
	}
	if (next_hop == NEEDS_NEIGHBOUR)
		return bpf_redirect_neigh(f->ifindex, NULL, 0, 0);
	return bpf_redirect(f->ifindex, 0);
}

/* What is wrong with its tags; else the frame is without them. */
ONCE int take_off(struct __sk_buff *skb, struct packet *p, u32 outer, u32 flags)
{
	if (!p || !outer)
		return 0;
	if (p->vlan)
		return bpf_skb_vlan_pop(skb) ? REASON_ERROR : 0;
	if (p->narrow)
		return take_tags(skb, p);
	return flags & TRUNK ? REASON_UNKNOWN_VLAN : REASON_TAGGED;
}

/* Lines 8 to 14. */
INLINE int across(struct __sk_buff *skb, struct packet *p, struct network *n)
{
	u32 mtu = n->mtu - (p->narrow ? RIDING_BYTES : 0);
	int reason;

	if (p->came[0] & 1) {
		if (p->icmp_kind == ICMP_ERROR)
			return drop(skb, p->source, REASON_ICMP_UNRELATED);
		if (skb->len - ETH_BYTES > mtu)
			return drop(skb, p->source, REASON_TOO_BIG);
		return to_all(skb, p);
	}
	reason = decide(skb, p);
	if (reason)
		return refused(skb, p, reason, mtu);
	if (p->answered)
		return back(skb, p);
	return forward(skb, p, mtu, n->underlay);
}

/* The long way for a frame from a workload. Every check is a line of docs/datapath.md. */
INLINE int from_workload(struct __sk_buff *skb)
{
	u32 zero = 0, ifindex = skb->ifindex;
	struct packet *p = bpf_map_lookup_elem(&at_hand, &zero);
	u32 outer = outermost(skb);
	struct attach_key at = { ifindex, outer >> 16 == ETH_VLAN ? outer & 0xfff : 0 };
	struct attach *here = bpf_map_lookup_elem(&attach, &at);
	struct port *from;
	struct segment *s;
	struct network *n;
	int reason, closed;

	if (!p)
		return TC_ACT_SHOT;
	memset(p, 0, sizeof(*p));
	p->epoch = epoch_now();
	p->now = seconds();
	p->where = ifindex;
	if (here) {
		p->vlan = at.tag;
	} else if (at.tag) {
		at.tag = 0;
		here = bpf_map_lookup_elem(&attach, &at);
	}
	if (!here)
		return drop(skb, 0, REASON_NOT_ATTACHED);
	p->source = here->port;
	from = bpf_map_lookup_elem(&port, &p->source);
	if (!from || !from->id)
		return drop(skb, 0, REASON_NOT_ATTACHED);
	p->network = from->network;
	p->sum = verdict_sum(p->network, p->source, 0) + COUNTER_OF(route, p->network);
	p->segment = from->segment;
	p->a = place_of(from);
	n = bpf_map_lookup_elem(&network, &p->network);
	s = bpf_map_lookup_elem(&segment, &p->segment);
	p->narrow = s && s->flags & TRANSPARENT;
	closed = !(from->flags & ENABLED) ? REASON_PORT_DISABLED : !n || !(n->flags & ENABLED) ? REASON_NETWORK_DISABLED : 0;
	if (closed && (outer || (!n || !(from->flags & AGENT))))
		return drop(skb, p->source, closed);
	if (!n)
		return TC_ACT_SHOT;
	reason = take_off(skb, p, outer, from->flags);
	if (!reason)
		reason = parse_ethernet(skb, p);
	if (!reason && !same_mac(p->came + 6, from->mac))
		reason = REASON_SOURCE_MAC;
	if (closed && (reason || p->ether_type == ETH_ARP))
		reason = closed;
	if (reason)
		return drop(skb, p->source, reason);
	if (p->ether_type == ETH_ARP) {
		reason = parse_arp(skb, p);
		if (!reason)
			reason = guard_arp(p);
		if (!reason && !p->tags)
			reason = answer_arp(skb, p);
		if (reason)
			return drop(skb, p->source, reason);
		return p->tags ? across(skb, p, n) : back(skb, p);
	}
	reason = parse_ip(skb, p);
	if (closed && (reason || !seeks_relay(skb, p)))
		return drop(skb, p->source, closed);
	if (!reason)
		reason = guard(p, 0);
	if (!reason && is_discovery(p)) {
		reason = guard_nd(skb, p);
		if (!reason && !p->tags)
			reason = answer_nd(skb, p);
		if (reason)
			return drop(skb, p->source, reason);
		return p->tags ? across(skb, p, n) : back(skb, p);
	}
	if (!reason && !p->tags && is_inquiry(p))
		return to_agent(skb, p);
	if (!reason && !p->tags && from->flags & AGENT && is_for_relay(p))
		return to_relay(skb, p);
	if (!reason)
		reason = reassemble(p);
	if (reason)
		return drop(skb, p->source, reason);
	return across(skb, p, n);
}

/* Who sent an inner frame: a port by its MAC, or one behind a router by its address. */
ONCE int find_sender(struct packet *p)
{
	struct mac *found;
	struct owner *there;
	struct segment *s;

	if (!p)
		return REASON_ERROR;
	found = mac_of(p->segment, p->came + 6);
	p->router = 0;
	if (found && found->kind == OWNER_PORT) {
		p->source = found->slot;
		return 0;
	}
	if (p->where & FROM_VLAN) { /* each machine has a MAC of its own for the segment's router; to all it sends nothing */
		s = found || p->came[0] & 1 ? NULL : bpf_map_lookup_elem(&segment, &p->segment);
		if (!s || !s->router)
			return REASON_UNKNOWN_SOURCE;
		p->router = s->router;
	} else {
		if (!found)
			return REASON_UNKNOWN_SOURCE;
		p->router = found->slot;
	}
	if (p->tags)
		return REASON_TAGGED;
	there = owner_of(route_of(p->router, &p->tuple.source), &p->tuple.source);
	if (!there || there->kind != OWNER_PORT)
		return REASON_UNKNOWN_SOURCE;
	p->source = there->slot;
	return 0;
}

INLINE int by_ecn(struct __sk_buff *skb, struct packet *p)
{
	u8 byte, was;
	u32 at = ETH_BYTES + 1;

	/* RFC 6040, figure 4: what the inner packet becomes */
	if (p->outer_ecn == 3 && p->ecn == 0)
		return REASON_ECN;
	if (!(p->outer_ecn == 3 && p->ecn != 3) && !(p->outer_ecn == 1 && p->ecn == 2))
		return 0;
	if (load(skb, at, &was, 1))
		return REASON_ERROR;
	if (p->tuple.family == 4) {
		byte = (was & ~3) | p->outer_ecn;
		bpf_l3_csum_replace(skb, ETH_BYTES + 10, swap16(was), swap16(byte), 2);
	} else {
		byte = (was & ~0x30) | p->outer_ecn << 4;
	}
	return bpf_skb_store_bytes(skb, at, &byte, 1, 0) ? REASON_ERROR : 0;
}

enum { FOR_ALL = -3 };

/* Is its home this machine, and this one alone? */
ONCE int lives_only_here(u32 slot, u32 here)
{
	return machine_of(slot, 0) == here && machine_of(slot, 1) == here;
}

/* The long way for what came out of a VXLAN datagram, or from a VLAN: the skb begins with the inner Ethernet header. */
ONCE int from_wire(struct __sk_buff *skb, struct packet *p)
{
	struct vni_key label;
	struct vni *found;
	struct segment *s;
	struct network *n;
	struct port *from, *q = NULL;
	struct mac *to;
	u32 zero = 0;
	struct flow *f = bpf_map_lookup_elem(&composing, &zero);
	struct path *pays = bpf_map_lookup_elem(&paying, &zero);
	int reason;

	if (!p || !f || !pays)
		return TC_ACT_SHOT;
	label.vni = p->where & 0xffffff;
	if (p->where & FROM_VLAN) {
		p->segment = label.vni;
	} else {
		found = bpf_map_lookup_elem(&vni, &label);
		if (!found)
			return drop(skb, 0, REASON_UNKNOWN_VNI);
		p->segment = found->segment;
	}
	p->target_segment = p->segment;
	s = bpf_map_lookup_elem(&segment, &p->segment);
	p->network = s ? s->network : 0;
	n = bpf_map_lookup_elem(&network, &p->network);
	if (!n || !(n->flags & ENABLED))
		return drop(skb, 0, REASON_NETWORK_DISABLED);
	p->narrow = s && s->flags & TRANSPARENT;
	if (p->tags && !p->narrow)
		return drop(skb, 0, REASON_TAGGED);
	if (!p->cut && !(p->where & FROM_VLAN) && made_whole(skb))
		return drop(skb, 0, REASON_ERROR);
	reason = p->cut == BEFORE_IP ? REASON_MALFORMED : parse_ethernet(skb, p);
	if (!reason && p->ether_type == ETH_ARP && !p->tags)
		reason = REASON_ETHER_TYPE;
	if (!reason)
		reason = p->cut ? REASON_MALFORMED : p->ether_type == ETH_ARP ? parse_arp(skb, p) : parse_ip(skb, p);
	if (!reason)
		reason = find_sender(p);
	if (reason)
		return drop(skb, 0, reason);
	p->sum = verdict_sum(p->network, p->source, 0) + COUNTER_OF(route, p->network);
	reason = find_sender(p);
	from = bpf_map_lookup_elem(&port, &p->source);
	if (reason || !from || !from->id)
		return drop(skb, 0, REASON_UNKNOWN_SOURCE);
	p->a = place_of(from);
	if (p->where & FROM_VLAN) {
		if (lives_only_here(from->host, p->sender))
			return drop(skb, 0, REASON_SENDER_LOCATION);
	} else if (machine_of(from->host, 0) != p->sender && machine_of(from->host, 1) != p->sender)
		return drop(skb, 0, REASON_SENDER_LOCATION);
	reason = p->ether_type == ETH_ARP ? guard_arp(p) : guard(p, p->router);
	if (!reason && is_discovery(p))
		reason = p->tags ? guard_nd(skb, p) : REASON_ND_SPOOF;
	if (!reason && !p->tags && is_inquiry(p))
		reason = REASON_ASKED_ELSEWHERE;
	if (!reason)
		reason = reassemble(p);
	if (reason)
		return drop(skb, 0, reason);
	if (p->came[0] & 1) {
		reason = p->icmp_kind == ICMP_ERROR ? REASON_ICMP_UNRELATED : by_ecn(skb, p);
		return reason ? drop(skb, 0, reason) : FOR_ALL;
	}
	to = mac_of(p->segment, p->came);
	p->target = to && to->kind == OWNER_PORT ? to->slot : 0;
	p->sum += COUNTER_OF(port, p->target);
	to = mac_of(p->segment, p->came);
	if (p->target && to && to->kind == OWNER_PORT && to->slot == p->target)
		q = bpf_map_lookup_elem(&port, &p->target);
	if (!q || !(q->flags & LOCAL))
		return drop(skb, 0, REASON_NOT_HERE);
	if (!(q->flags & ENABLED))
		return drop(skb, p->target, REASON_PORT_DISABLED);
	p->b = place_of(q);
	reason = track(skb, p);
	if (!reason)
		reason = carry(p->a, p->b, n->underlay, p->epoch, &p->way);
	if (!reason)
		reason = by_ecn(skb, p);
	if (!reason && !q->ifindex)
		reason = REASON_NOT_ATTACHED;
	if (!reason)
		reason = find_tolls(p, p->b, OWN);
	if (reason)
		return drop(skb, p->target, reason);
	remember(p);
	remember_fragment(p);
	memset(f, 0, sizeof(*f));
	f->out = q->flags & TAP ? TO_TAP : TO_WORKLOAD;
	f->ifindex = q->ifindex;
	f->tag = q->tag;
	memcpy(f->leaves, p->came, 12);
	f->ether_type = swap16(p->ether_type);
	if (p->where & FROM_VLAN && p->router) {
		struct router *r = bpf_map_lookup_elem(&router, &p->router);

		if (!r)
			return drop(skb, p->target, REASON_ERROR);
		memcpy(f->leaves + 6, r->mac, 6);
	}
	keep_tolls(f, pays, 1);
	if (is_cacheable(p))
		keep(p, f, n->mtu);
	if (f->tolls) {
		u32 tags = tag_bytes(p);

		reason = pay(skb, &f->toll, f->tolls << 16, skb->len + tags, header_bytes(skb, p) + tags);
		if (reason)
			return drop(skb, p->target, reason);
	}
	if (p->where & FROM_VLAN && p->router)
		bpf_skb_store_bytes(skb, 6, f->leaves + 6, 6, 0);
	put_tags(skb, p, 0);
	return to_workload(skb, p->target, q->ifindex, q->flags & TAP, q->tag);
}

/* A frame of a VLAN that is no known flow; its tag is off. */
ONCE int from_vlan(struct __sk_buff *skb, u32 slot)
{
	u32 zero = 0;
	struct packet *p = bpf_map_lookup_elem(&at_hand, &zero);
	struct self *me = bpf_map_lookup_elem(&self, &zero);
	int action;

	if (!p || !me)
		return TC_ACT_SHOT;
	memset(p, 0, sizeof(*p));
	p->epoch = epoch_now();
	p->now = seconds();
	p->where = FROM_WIRE | FROM_VLAN | slot;
	p->sender = me->machine;
	action = from_wire(skb, p);
	return action == FOR_ALL ? to_all(skb, p) : action;
}

#define NOT_VXLAN (~0u)

/* A datagram that is no known flow: its sender must be a member; then the outer headers come off. */
ONCE int from_member(struct __sk_buff *skb, u32 label, u32 outer_bytes, u32 outer_ecn)
{
	u32 zero = 0;
	struct packet *p = bpf_map_lookup_elem(&at_hand, &zero);
	struct member *from;
	u8 inner[ETH_BYTES], sender[4];
	u32 off;
	int action;

	if (!p)
		return TC_ACT_SHOT;
	memset(p, 0, sizeof(*p));
	if (outer_bytes == OUTER6) {
		if (load(skb, ETH_BYTES + 8, &p->sender_address, 16) || is_mapped(p->sender_address.bytes))
			return TC_ACT_NEXT;
	} else {
		if (load(skb, ETH_BYTES + 12, sender, 4))
			return TC_ACT_NEXT;
		map_ipv4(&p->sender_address, sender);
	}
	from = bpf_map_lookup_elem(&member, &p->sender_address);
	if (!from)
		return drop(skb, 0, REASON_NOT_A_MEMBER);
	if (label == NOT_VXLAN)
		return drop(skb, 0, REASON_VXLAN_HEADER);
	p->epoch = epoch_now();
	p->now = seconds();
	p->where = FROM_WIRE | label;
	p->sender = from->machine;
	p->outer_ecn = outer_ecn;
	/* Too short to be anything: made longer, so that the outer headers come off. `from_wire` says what it is. */
	if (skb->len < outer_bytes + ETH_BYTES)
		p->cut = BEFORE_IP;
	read_tags(skb, p, outer_bytes);
	off = outer_bytes + tag_bytes(p); /* where what stands behind the tags stood without */
	if (skb->len < off + ETH_BYTES + 40 &&
	    (p->cut || load(skb, off, inner, ETH_BYTES) ||
	     skb->len < off + ETH_BYTES + (load16(inner + 12) == ETH_IPV6 ? 40 : 20))) {
		if (!p->cut)
			p->cut = IN_IP;
		if (bpf_skb_change_tail(skb, off + ETH_BYTES + 40, 0))
			return drop(skb, 0, REASON_ERROR);
	}
	if (load(skb, off, inner, ETH_BYTES) || (p->tags && load(skb, outer_bytes, inner, 12)))
		return drop(skb, 0, REASON_ERROR);
	if (take_room(skb, off, load16(inner + 12)) || bpf_skb_store_bytes(skb, 0, inner, ETH_BYTES, 0))
		return drop(skb, 0, REASON_ERROR);
	if (p->tags && load16(inner + 12) == ETH_ARP && become(skb, ETH_ARP))
		return drop(skb, 0, REASON_ERROR);
	action = from_wire(skb, p);
	return action == FOR_ALL ? to_all(skb, p) : action; /* from here, because stacks are short */
}

SEC("tc") int workload(struct __sk_buff *skb)
{
	int action = UNLIKELY(skb->vlan_present) ? known_behind_tags(skb) : known_from_workload(skb);

	return action == NOT_KNOWN ? from_workload(skb) : action;
}

/* On a NIC to a physical network. What is no VLAN of ours there is the machine's own. */
SEC("tc") int trunk(struct __sk_buff *skb)
{
	u32 tag = outermost(skb), slot;
	struct vlan_key key = { skb->ifindex, tag & TAG_ID };
	struct vlan *found;
	int action;

	if (tag >> 16 != ETH_VLAN)
		return TC_ACT_NEXT;
	if (!key.id)
		return drop(skb, 0, REASON_UNKNOWN_VLAN);
	found = bpf_map_lookup_elem(&vlan, &key);
	if (!found)
		return TC_ACT_NEXT;
	slot = found->segment;
	if (bpf_skb_vlan_pop(skb))
		return drop(skb, 0, REASON_ERROR);
	if (outermost(skb))
		return drop(skb, 0, REASON_TOO_MANY_TAGS);
	if (skb->protocol == swap16(ETH_RARP)) /* what machines tell switches */
		return TC_ACT_SHOT;
	action = known_from_vlan(skb, slot);
	return action == NOT_KNOWN ? from_vlan(skb, slot) : action;
}

/* Bytes that are looked at in any case. What is there already is not asked for: some of the payload would come along,
 * which costs more than all the rest. */
#define LEAST_BYTES (OUTER4 + ETH_BYTES)

SEC("tc") int underlay(struct __sk_buff *skb)
{
	void *data, *end;
	u32 zero = 0, label, outer_bytes, length, total;
	struct self *me = bpf_map_lookup_elem(&self, &zero);
	struct machine *own;
	u8 outer_ecn;
	u8 *eth, *ip, *udp, *vxlan;
	int action, is_ours;

	if (UNLIKELY(me && me->vlan)) {
		action = untag(skb, me->vlan);
		if (action != IN_VLAN)
			return action;
	}
	length = skb->len - ETH_BYTES;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + LEAST_BYTES > end) {
		bpf_skb_pull_data(skb, skb->len < OUTER6 + USUAL_INNER ? skb->len : OUTER6 + USUAL_INNER);
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}
	eth = data;
	ip = data + ETH_BYTES;
	/* A tag is here for another VLAN of the NIC: another wire, with other neighbours. */
	if (skb->vlan_present || data + OUTER4 - 8 > end)
		return TC_ACT_NEXT;
	if (WORD16(eth + 12) == swap16(ETH_IPV4)) {
		if (ip[0] != 0x45 || WORD16(ip + 6) & swap16(0x3fff) || ip[9] != UDP)
			return TC_ACT_NEXT;
		udp = ip + 20;
		outer_bytes = OUTER4;
		outer_ecn = ip[1] & 3;
	} else if (WORD16(eth + 12) == swap16(ETH_IPV6)) {
		if (data + OUTER6 - 8 > end || ip[0] >> 4 != 6 || ip[6] != UDP)
			return TC_ACT_NEXT;
		udp = ip + 40;
		outer_bytes = OUTER6;
		outer_ecn = ip[1] >> 4 & 3;
	} else {
		return TC_ACT_NEXT;
	}
	if (WORD16(udp + 2) != swap16(CARRIAGE_PORT))
		return TC_ACT_NEXT;
	own = me ? bpf_map_lookup_elem(&machine, &me->machine) : NULL;
	if (!own)
		return TC_ACT_NEXT;
	is_ours = outer_bytes == OUTER4 ? is_address((struct address *)own->address, ip + 16, OUTER4) :
					  is_address((struct address *)own->address, ip + 24, OUTER6) &&
						  !is_mapped(own->address);
	if (!is_ours)
		return TC_ACT_NEXT;
	/* Lengths of a GSO packet are of the whole, which may be more than they can say. */
	if (!skb->gso_size) {
		total = outer_bytes == OUTER4 ? swap16(WORD16(ip + 2)) : swap16(WORD16(ip + 4)) + 40;
		if (total > length || total < outer_bytes - ETH_BYTES - 8)
			return TC_ACT_NEXT;
		if (total < length) {
			if (bpf_skb_change_tail(skb, ETH_BYTES + total, 0))
				return TC_ACT_SHOT;
			data = (void *)(long)skb->data;
			end = (void *)(long)skb->data_end;
		}
	}
	vxlan = outer_bytes == OUTER4 ? data + OUTER4 - 8 : data + OUTER6 - 8;
	if ((void *)vxlan + 8 > end)
		goto unusual;
	label = swap32(WORD32(vxlan + 4)) >> 8;
	if (WORD32(vxlan) != swap32(0x08000000) || vxlan[7])
		goto unusual;
	if (vxlan + 8 + ETH_BYTES <= (u8 *)end && UNLIKELY(is_tag(load16(vxlan + 8 + 12))))
		action = outer_bytes == OUTER4 ? riding_over_ipv4(skb, label, outer_ecn) :
						 riding_over_ipv6(skb, label, outer_ecn);
	else
		action = outer_bytes == OUTER4 ? known_over_ipv4(skb, label, outer_ecn) :
						 known_over_ipv6(skb, label, outer_ecn);
	if (action != NOT_KNOWN)
		return action;
	return from_member(skb, label, outer_bytes, outer_ecn);
unusual:
	return from_member(skb, NOT_VXLAN, outer_bytes, 0);
}

char _license[] SEC("license") = "GPL";
