"""Do the tests bite? Each fault here is one line of the datapath gone wrong, built, loaded, and held to the reference.

Worlds and conversations are those of test_kernel.py, drawn once with a fixed seed: what the reference expects is kept
and played to every mutant until it does something else. One that does everything right survives, and that is a failure:
then the tests do not see what the line is for.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path

import pytest
from frames import ip_frame, udp
from strategies import (
    START,
    Step,
    across,
    detour,
    some_chatter,
    some_crossings,
    some_dialogues,
    some_inquiries,
    some_rounds,
    some_torrents,
    tower,
)
from test_hostile import Field, bed, change, field_, onslaught
from twins import Mismatch, Operation, Teller, devices, play, recording

from nestnet.datapath import build
from nestnet.model import packet as pk
from nestnet.model.values import CONNECTION_SHARE

__all__ = ["bed", "field_"]
pytestmark = pytest.mark.root
NAME = f"nnt-mutants-{os.getpid()}"
SEED = 20261122
ROUNDS, CROSSINGS, CHATTER, INQUIRIES, TORRENTS, DIALOGUES = 30, 16, 20, 10, 40, 400
CLOSINGS = 40
TAGGED = 12
SWITCHED = 12
LIMITED = (21, 58)  # torrents with rates that refuse what comes by a VLAN
COPIED = (2, 4)  # rounds with frames for all that trunks get, too
CONGESTED = (48, 61)  # rounds with congestion told by a datagram whose packet cannot tell it
RARE = (54,)  # seeds of torrents in which hosts of one frame for all have ports that hear it together
DENIED = (341, 612)  # seeds of dialogues with errors about answers that the policies no longer allow
SHARE = 60  # frames of each hostile row


@dataclass(frozen=True)
class Fault:
    """In a file of bpf/, `right` (there once) becomes `wrong`."""

    name: str
    file: str
    right: str
    wrong: str


FAULTS = [
    Fault("anybody's source MAC", "nestnet.bpf.c", "if (!reason && !same_mac(p->came + 6, from->mac))", "if (0)"),
    Fault(
        "ARP for anybody's address", "answer.h",
        "if (port_of(p->segment, &p->tuple.source) != p->source &&", "if (0 &&",
    ),
    Fault("ND option not looked at", "answer.h", "if (has && !same_mac(option, p->came + 6))", "if (0)"),
    Fault("any source address", "guard.h", "if (port_of(p->segment, &t->source) == p->source)", "if (1)"),
    Fault("router advertisements pass", "guard.h", "p->icmp_type == 134 ||", "0 ||"),
    Fault("errors are all the first router's", "icmp.h", "bpf_loop(passed, step_on, NULL, 0);", ""),
    Fault("no router faces anybody", "icmp.h", "f ? f->address4 : r->address4", "r->address4"),
    Fault("errors without end", "icmp.h", "!spend(bucket, TOLD_COST, TOLD_BURST, now_ns())", "0"),
    Fault("errors about errors", "icmp.h", "p->icmp_kind != ICMP_ERROR &&", ""),
    Fault("errors about multicast", "icmp.h", "!is_for_many(&p->tuple.target) &&", ""),
    Fault("as much as there is, quoted", "icmp.h", "length = v4 ? QUOTE4 : QUOTE6;", ";"),
    Fault("quoted as it was sent", "icmp.h", "if (passed)\n\t\ttake_hops(", "if (0)\n\t\ttake_hops("),
    Fault("errors from near", "icmp.h", "ROUTER_TTL - passed", "ROUTER_TTL"),
    Fault("echo from near", "answer.h", "ROUTER_TTL + 1 - (p->hops ? p->hops : 1)", "ROUTER_TTL"),
    Fault("TTL before size at every router", "nestnet.bpf.c", "if (p->hops && p->ttl <= 1)", "if (0)"),
    Fault("errors of IPv4 in IPv6", "icmp.h", "return v4 ? 3 << 8 | 1 : 1 << 8 | 3;", "return 3 << 8 | 1;"),
    Fault("no such port, whatever the protocol", "icmp.h", "(protocol == TCP || protocol == UDP ? 3 : 2)", "3"),
    Fault("too big, but for what", "icmp.h", "head[40] = mtu >> 8;", ""),
    Fault("too big, but for what, over IPv6", "icmp.h", "head[60] = mtu >> 8;", ""),
    Fault("errors to senders that no router knows", "icmp.h", "!passes_no_router(&p->tuple) &&", ""),
    Fault("errors about pings of routers", "icmp.h", "!(reason == REASON_ROUTER_LOCAL && is_icmp(&p->tuple))", "1"),
    Fault("errors about later fragments", "icmp.h", "p->fragment != LATER_FRAGMENT &&", ""),
    Fault("a closed port of the nearest router", "icmp.h", "if (reason == REASON_ROUTER_LOCAL)", "if (0)"),
    Fault("errors from any router's MAC", "icmp.h", "p->first ? p->came : r->mac", "r->mac"),
    Fault("half a checksum of errors", "icmp.h", "i < QUOTE6 && i < length", "i < QUOTE4 && i < length"),
    Fault("errors about anything pass", "connection.h", "? 0 : REASON_ICMP_UNRELATED;", "? 0 : 0;"),
    Fault(
        "errors about their own sender's packets only", "connection.h",
        "reverse(&p->key.tuple, &p->quote);", "p->key.tuple = p->quote;",
    ),
    Fault(
        "errors about what is denied now", "connection.h",
        "return c && opener_may(&p->key, c, p->network);", "return c != NULL;",
    ),
    Fault("pings of far routers that nobody allowed", "nestnet.bpf.c", "if (where == ROUTER && !may(p))", "if (0)"),
    Fault("pings reach any router", "nestnet.bpf.c", "((p->hops > 1 && p->ttl < p->hops) || ", "("),
    Fault(
        "pings in fragments are not remembered", "nestnet.bpf.c",
        "remember_fragment(p);\n\t\t\treturn", "return",
    ),
    Fault("each fragment of a ping has a type", "answer.h", "if (p->fragment != LATER_FRAGMENT) {", "if (1) {"),
    Fault(
        "nobody there, however far", "nestnet.bpf.c",
        "p->ttl <= p->hops ? REASON_TTL_EXPIRED : REASON_UNREACHABLE", "REASON_UNREACHABLE",
    ),
    Fault("the first of equal ways", "way.h", "% row->count;", "* 0;"),
    Fault("fragments by their ports", "way.h", "p->fragment == WHOLE, seed_of(r))", "1, seed_of(r))"),
    Fault("carriage takes the first of equal ways", "path.h", "% row->count;", "* 0;"),
    Fault("carriage takes the ways of other routers", "path.h", "w->ports, seed_of(r))", "w->ports, 0)"),
    Fault("no new checksum for a TTL", "out.h", "if (family == 4)\n\t\tbpf_l3", "if (0)\n\t\tbpf_l3"),
    Fault(
        "hops of the first packet only", "flow.h",
        "if (f->hops)\n\t\t\ttake_hops(skb, f->outer_bytes", "if (0)\n\t\t\ttake_hops(skb, f->outer_bytes",
    ),
    Fault("no hops on one machine", "flow.h", "take_hops(skb, ETH_BYTES, key.tuple.family, ttl, f->hops);\n\t}", "}"),
    Fault("a bucket has no room", "rates.h", "u64 full = now > burst ? now - burst : 0;", "u64 full = now;"),
    Fault("rates in bytes", "rates.h", "* 8 * SECOND", "* SECOND"),
    Fault("carriers' rates are one's own", "rates.h", "above ? REASON_CARRIER_RATE : REASON_RATE", "REASON_RATE"),
    Fault("who sends is not paid", "path.h", "add_toll(w, &w->leave, &w->leaving, from->out);", ""),
    Fault(
        "who arrives pays the innermost first", "path.h",
        "w->arrive.each[(PATH_BUCKETS - w->arriving + i) & (PATH_BUCKETS - 1)]",
        "w->arrive.each[(PATH_BUCKETS - 1 - i) & (PATH_BUCKETS - 1)]",
    ),
    Fault(
        "hosts of a frame for all pay the innermost first", "flood.h",
        "(PATH_BUCKETS - w->arriving) | PATH_BUCKETS << 16", "w->arriving << 16",
    ),
    Fault("machines that are disabled", "carriage.h", "if (!a->at || !b->at)", "if (0)"),
    Fault("hosts that send are not paid", "path.h", "if (w->links && add_toll", "if (0 && add_toll"),
    Fault("each level is as long as the first", "path.h", "w->above += w->family == 6", "w->above = w->family == 6"),
    Fault("deny is allow", "policy.h", "best && !((best - 1) & DENY)", "best"),
    Fault("lower rank wins", "policy.h", "found->rank + 1 > best", "(!best || found->rank + 1 < best)"),
    Fault("policy forgets services", "policy.h", "q->about[2] = service_class(q, rules);", "q->about[2] = 0;"),
    Fault("no TTL decrement", "out.h", "u8 less = ttl - hops;", "u8 less = ttl;"),
    Fault("one hop, however many routers", "out.h", "u8 less = ttl - hops;", "u8 less = ttl - 1;"),
    Fault("the first router's MAC", "way.h", "p->router = found->next;", "(void)found;"),
    Fault("equal costs by half a MAC", "lookup.h", "(u32)r->mac[2] << 24 | r->mac[3] << 16 |", "(u32)0 |"),
    Fault("equal costs by another hash", "way.h", "== WHOLE, seed_of(r))", "== WHOLE, 0)"),
    Fault(
        "TTL 1 is routed", "nestnet.bpf.c",
        "if (p->hops && p->ttl <= p->hops)\n\t\treturn refused", "if (0)\n\t\treturn refused",
    ),
    Fault("TTL 1 is routed by a flow", "flow.h", "|| (f->hops && ttl <= f->hops)", ""),
    Fault(
        "MTU off by one", "nestnet.bpf.c",
        "if (too_long(skb, length, headers, mtu))", "if (too_long(skb, length, headers, mtu + 1))",
    ),
    Fault("link-local is routed", "nestnet.bpf.c", "if (where == ROUTED && passes_no_router(&p->tuple))", "if (0)"),
    Fault("senders live anywhere", "nestnet.bpf.c", "machine_of(from->host, 0) != p->sender &&", "0 &&"),
    Fault(
        "flows from any machine", "flow.h",
        "!is_address(&f->sender, data + ETH_BYTES + (outer == OUTER4 ? 12 : 8), outer) ||", "",
    ),
    Fault(
        "flows from any machine with such an end of its IPv6 address", "flow.h",
        "WORD64(field) == WORD64(address->bytes) && ", "",
    ),
    Fault(
        "datagrams to any machine", "nestnet.bpf.c",
        "if (!is_ours)", "if (!is_ours && !own->id)",
    ),
    Fault("flows from such a beginning of a MAC", "flow.h", " && WORD32(frame + 8) == WORD32(came + 8)", ""),
    Fault("flows from any MAC", "flow.h", " || !same_macs(data + outer, f->came)", ""),
    Fault(
        "everybody is a member", "nestnet.bpf.c",
        "return drop(skb, 0, REASON_NOT_A_MEMBER);", "from = &(struct member){ 1 };",
    ),
    Fault(
        "receiver does not judge carriers", "nestnet.bpf.c",
        "reason = track(skb, p);\n\tif (!reason)\n\t\treason = carry(p->a",
        "reason = track(skb, p);\n\tif (0)\n\t\treason = carry(p->a",
    ),
    Fault("carriers without policies", "carriage.h", "if (!judge(q))", "if (0)"),
    Fault("floods without policies", "flood.h", "if (!p->about_neighbours && !judge(asked))", "if (0)"),
    Fault(
        "replies are always allowed", "connection.h",
        "if (!judge_tuple(net, key->source, key->target, &key->tuple))", "if (0)",
    ),
    Fault(
        "connections live for ever", "connection.h",
        "return now - c->seen < life;", "return now - c->seen < life * 1000;",
    ),
    Fault("no share", "connection.h", "|| *ever - *gone >= row->share)", ")"),
    Fault("FIN closes nothing", "connection.h", "p->tcp_flags & (FIN | RST);", "0;"),
    Fault("fragments are not remembered", "connection.h", "bpf_map_update_elem(&fragment, &key, &first, BPF_ANY);", ""),
    Fault("fragments of anybody", "connection.h", "key->port = p->source;", "key->port = 0;"),
    Fault("ECN is not copied", "out.h", "to[15] = ecn;", "to[15] = 0;"),
    Fault("ECN is not copied over IPv6", "out.h", "to[15] = ecn << 4;", "to[15] = 0;"),
    Fault("IPv6's length counts its own header", "out.h", "length -= 40;", ""),
    Fault("IPv6 hop limit", "out.h", "o[21] = 64;", "o[21] = 63;"),
    Fault("IPv6 from nobody", "out.h", "memcpy(o + 22, here->address, 16);", "memcpy(o + 22, here->address, 15);"),
    Fault("IPv6 with the room of IPv4", "out.h", "o += OUTER6 - OUTER4;", ""),
    Fault("outer ECN of IPv6 where IPv4's is", "nestnet.bpf.c", "= ip[1] >> 4 & 3;", "= ip[1] & 3;"),
    Fault("congestion is forgotten", "nestnet.bpf.c", "p->outer_ecn == 3 && p->ecn != 3", "0"),
    Fault("hash without ports", "hash.h", "ports ? (u32)t->source_port << 16 | t->target_port : 0", "0"),
    Fault("entropy of the inner tunnel is lost", "hash.h", "return t->source_port;", ";"),
    Fault("epochs are never compared", "flow.h", "sum + p->way.sum != f->sum", "sum == 1"),
    Fault(
        "carriers' changes are not seen", "flow.h",
        "sum + p->way.sum != f->sum", "sum - flow_sum(f->source, f->target, f->network)",
    ),
    Fault("who moves is heard from one place", "nestnet.bpf.c", " && machine_of(from->host, 1) != p->sender)", ")"),
    Fault("who moves is where it was", "lookup.h", "own ? own->at : 0", "own ? own->from ? own->from : own->at : 0"),
    Fault(
        "what is on one host is always here", "carriage.h",
        "w->a = below_a;\n", "if (from == to) {\n\t\tw->done = 1;\n\t\treturn 1;\n\t}\n\tw->a = below_a;\n",
    ),
    Fault("DHCP is forwarded", "inquiry.h", "t->source_port == 68 && t->target_port == 67", "0"),
    Fault("solicitations of routers are forwarded", "inquiry.h", "return p->icmp_type == 133;", "return 0;"),
    Fault("inquiries in fragments", "inquiry.h", "p->fragment != WHOLE ||", ""),
    Fault("inquiries without end", "inquiry.h", "may_ask(p, INQUIRY_COST)", "0"),
    Fault("inquiries of others", "inquiry.h", "u32 slot = p ? p->source : 0;", "u32 slot = 1;"),
    Fault("anybody has a relay", "nestnet.bpf.c", "from->flags & AGENT && is_for_relay(p)", "is_for_relay(p)"),
    Fault("the relay has any MAC", "inquiry.h", "same_mac(p->came, nobody_mac) &&", ""),
    Fault("the relay hears any address", "inquiry.h", "&& is_link_local_of(&t->source, p->came + 6)", ""),
    Fault("the relay has any port", "inquiry.h", "t->target_port == RELAY_PORT &&", ""),
    Fault("the relay hears UDP", "inquiry.h", "t->protocol == TCP &&", ""),
    Fault("the relay hears extension headers", "inquiry.h", "p->l4 == ETH_BYTES + 40 &&", ""),
    Fault("the relay has any address", "answer.h", "&& a->words[3] == swap32(1);", ";"),
    Fault("the relay without end", "inquiry.h", "reason = may_ask(p, RELAY_COST)", "reason = 0"),
    Fault("the relay costs nothing", "inquiry.h", "#define RELAY_COST 100000ull", "#define RELAY_COST 0ull"),
    Fault("nobody finds the relay", "answer.h", "if (has_relay(p) && is_relay(&p->given)) {", "if (0) {"),
    Fault("anybody finds a relay", "answer.h", "if (has_relay(p) && is_relay(", "if (is_relay("),
    Fault("solicitations only with an address", "guard.h", "p->icmp_type <= 133)", "p->icmp_type <= 132)"),
    Fault("a foreign change is never taken", "carriage.h", "if (w->sum == kept->sum)", "if (1)"),
    Fault("no rates", "rates.h", "if (!spend(left, cost, row->burst, now))", "if (cost > now)"),
    Fault("a bucket is never full", "rates.h", "(was > full ? was : full) + cost", "(full ? was : 0) + cost"),
    Fault("what is refused is paid", "rates.h", "if (was > now)", "if (was > now && (*until += cost))"),
    Fault("a port is paid the wrong way", "path.h", "&w->arriving, to->in)", "&w->arriving, to->out)"),
    Fault("a host is paid the wrong way", "path.h", "&w->arriving, pb->in)", "&w->arriving, pb->out)"),
    Fault("carriers see no headers of theirs", "rates.h", "w.packets * above", "0"),
    Fault("IPv6 headers are as short as IPv4's", "path.h", "w->family == 6 ? 70 : 50", "50"),
    Fault("links cost nothing", "path.h", "&w->leaving, found->bucket)", "&w->leaving, 0)"),
    Fault("carriage takes any link", "path.h", "w->tuple.source_port = w->source_port;", "w->tuple.source_port = 0;"),
    Fault("nine rates are not too many", "path.h", "w->reason = REASON_CANNOT_FLATTEN;", "w->reason = 0;"),
    Fault(
        "known flows pay nothing", "flow.h",
        "pay(skb, &f->toll, f->leaving << 16, weight, headers + tags * TAG_BYTES);", "0;",
    ),
    Fault("known flows arrive unpaid", "flow.h", "skb->len - outer, headers + tags * TAG_BYTES);", "0, 0) & 0;"),
    Fault(
        "known flows pay for outer headers", "flow.h",
        "skb->len - outer, headers + tags * TAG_BYTES);", "skb->len, headers);",
    ),
    Fault("frames for all cost their sender nothing", "flood.h", "if (from->out && ", "if (0 && "),
    Fault("hosts pay for each port", "flood.h", "if (is_here && *said >> 8 == *number)", "if (0)"),
    Fault("copies that cost too much leave", "flood.h", "*gone = c->stamp;\n\t\tdrop(", "drop("),
    Fault("errors to all", "nestnet.bpf.c", "if (p->icmp_kind == ICMP_ERROR)", "if (0)"),
    Fault("what follows a datagram", "nestnet.bpf.c", "if (total < length) {", "if (0) {"),
    Fault("half a datagram", "nestnet.bpf.c", "if (total > length || total < outer_bytes - ETH_BYTES - 8)", "if (0)"),
    Fault("half a last segment under two levels", "out.h", "family && (skb->gso_size ?", "0 && (skb->gso_size ?"),
    Fault("what is disabled hears nothing", "nestnet.bpf.c", "(!n || !(from->flags & AGENT))", "1"),
    Fault("what is disabled talks to all", "nestnet.bpf.c", "(reason || !seeks_relay(skb, p))", "reason"),
    Fault("half a packet in VXLAN", "nestnet.bpf.c", "reason = p->cut ? REASON_MALFORMED :", "reason ="),
    Fault("no tag for a trunk", "out.h", "if (UNLIKELY(tag) && put_tag(", "if (0 && put_tag("),
    Fault("no tag in a copy for a trunk", "flood.h", "put_tags(skb, p, q->tag);", "put_tags(skb, p, 0);"),
    Fault("tags that ride reach routers", "nestnet.bpf.c", "if (p->tags && p->first)", "if (0)"),
    Fault("tags in VXLAN of any segment", "nestnet.bpf.c", "if (p->tags && !p->narrow)", "if (0)"),
    Fault("no room for tags that ride", "nestnet.bpf.c", "if (!p->narrow && s->flags & TRANSPARENT)", "if (0)"),
    Fault("ARP behind tags is a policy matter", "flood.h", "!p->about_neighbours && !judge", "!judge"),
    Fault("one tag rides and not two", "tags.h", "if (!tag || bpf_skb_vlan_pop", "if (i || !tag || bpf_skb_vlan_pop"),
    Fault("tags of a known flow from the wire are lost", "flow.h", "read_tags(skb, p, outer);", ""),
    Fault("routers have one MAC on all machines", "nestnet.bpf.c", "memcpy(f->leaves + 6, s->mac, 6);", ";"),
    Fault(
        "what is routed by a VLAN comes from a NIC", "nestnet.bpf.c",
        "if (p->where & FROM_VLAN && p->router)\n\t\tbpf_skb", "if (0)\n\t\tbpf_skb",
    ),
    Fault(
        "a known flow that is routed by a VLAN comes from a NIC", "flow.h",
        "if (!same_mac(f->leaves + 6, f->came + 6))", "if (0)",
    ),
    Fault(
        "any MAC on a VLAN", "flow.h",
        "f = bpf_map_lookup_elem(&flow, &key);\n\tif (!f || !same_macs(data, f->came))",
        "f = bpf_map_lookup_elem(&flow, &key);\n\tif (!f)",
    ),
    Fault(
        "a second tag on a VLAN", "nestnet.bpf.c",
        "if (outermost(skb))\n\t\treturn drop(", "if (0)\n\t\treturn drop(",
    ),
    Fault("802.1ad on a VLAN", "nestnet.bpf.c", "if (tag >> 16 != ETH_VLAN)", "if (!tag)"),
    Fault("what switches are told is for ports", "nestnet.bpf.c", "if (skb->protocol == swap16(ETH_RARP))", "if (0)"),
    Fault("priority tags on a trunk", "nestnet.bpf.c", "if (!key.id)", "if (0)"),
    Fault(
        "a VLAN may speak for who lives here", "nestnet.bpf.c",
        "if (lives_only_here(from->host, p->sender))", "if (0)",
    ),
    Fault("a VLAN may speak for a router", "nestnet.bpf.c", "s = found || p->came[0] & 1 ?", "s = p->came[0] & 1 ?"),
    Fault("routers on a VLAN send to all", "nestnet.bpf.c", "s = found || p->came[0] & 1 ?", "s = found ?"),
    Fault("copies on a VLAN for nobody", "flood.h", "if (!c->encapsulated)", "if (0)"),
    Fault(
        "who sends on a VLAN pays for who arrives", "nestnet.bpf.c",
        "f->out != TO_WIRE && f->out != TO_VLAN", "f->out != TO_WIRE",
    ),
    Fault(
        "known flows of a VLAN arrive unpaid", "flow.h",
        "reason = pay(skb, &f->toll, f->tolls << 16, length, headers);", "reason = 0;",
    ),
]  # fmt: skip

# What nobody but hostile frames does, and what no test run shows: there packets have no tags beside their bytes, and
# what becomes of one that is left to the machine is not seen.
HOSTILE_FAULTS = [
    Fault(
        "IPv4 in IPv6", "packet.h",
        "if (is_mapped(p->tuple.source.bytes) || is_mapped(p->tuple.target.bytes))", "if (0)",
    ),
    Fault(
        "errors to all from the wire", "nestnet.bpf.c",
        "reason = p->icmp_kind == ICMP_ERROR ? REASON_ICMP_UNRELATED :", "reason =",
    ),
    Fault(
        "refused, and left to the machine", "out.h",
        "reason);\n\treturn TC_ACT_SHOT;", "reason);\n\treturn TC_ACT_NEXT;",
    ),
    Fault(
        "tags beside the bytes", "packet.h",
        "if (skb->vlan_present || is_tag(p->ether_type))", "if (is_tag(p->ether_type))",
    ),
    Fault(
        "tags on a known flow", "flow.h",
        "f = tagged && !key.tuple.vlan ? NULL : bpf_map_lookup_elem(&flow, &key);",
        "key.tuple.vlan = 0;\n\tf = bpf_map_lookup_elem(&flow, &key);",
    ),
    Fault("tags of a known flow are lost", "flow.h", "p->tags = tags;", "p->tags = 0;"),
    Fault("anything is a second tag", "flow.h", "if (tags == 2 && !is", "if (0 && !is"),
    Fault("ARP behind tags of anybody", "nestnet.bpf.c", "== ETH_ARP ? guard_arp(p)", "== ETH_ARP ? 0"),
    Fault(
        "known flows of a trunk with their tag", "flow.h",
        "if (tagged && (bpf_skb_vlan_pop(skb) || (inner && bpf_skb_vlan_pop(skb))))", "if (0)",
    ),
    Fault("tagged datagrams", "nestnet.bpf.c", "if (skb->vlan_present || data + OUTER4", "if (data + OUTER4"),
    Fault(
        "copies to whoever asks", "flood.h",
        "bpf_clone_redirect(skb, q->ifindex, 0);", "bpf_clone_redirect(skb, skb->ifindex, 0);",
    ),
    Fault("segments of any length", "flow.h", "skb->gso_size ? skb->gso_size + headers > mtu", "skb->gso_size ? 0"),
    Fault(
        "segments that shrink", "out.h",
        "BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP", "BPF_F_ADJ_ROOM_ENCAP_L4_UDP",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """A conversation that is drawn when it is told, with a seed of its own: then its place in the order is free."""

    draw: Callable[[random.Random], list[Step]]
    seed: int | str
    hostile: bool = False
    share: int = CONNECTION_SHARE
    sweep: bool = True


def talks() -> list[Talk]:
    """A few of each kind, then more of each, then the rest: most faults are found by the few, of some kind."""
    shares = [random.Random(f"{SEED} share {n}").choice([1, 2, 4096]) for n in range(DIALOGUES)]
    kinds = [
        [Talk(some_rounds, f"{SEED} round {n}", hostile=True) for n in range(ROUNDS)],
        [Talk(some_chatter, f"{SEED} chatter {n}") for n in range(CHATTER)],
        [Talk(some_inquiries, f"{SEED} inquiry {n}") for n in range(INQUIRIES)],
        [Talk(some_crossings, f"{SEED} crossing {n}") for n in range(CROSSINGS)],
        [Talk(some_torrents, f"{SEED} torrent {n}") for n in range(TORRENTS)],
        [Talk(partial(some_inquiries, closing=n % 2 == 0), f"{SEED} closing {n}") for n in range(CLOSINGS)],
        [
            Talk(some_dialogues, f"{SEED} dialogue {n}", share=share, sweep=share < 4096)
            for n, share in enumerate(shares)
        ],
        [Talk(partial(some_rounds, vlans=True), f"{SEED} tagged round {n}", hostile=True) for n in range(TAGGED)],
        [Talk(partial(some_chatter, vlans=True), f"{SEED} tagged chatter {n}") for n in range(TAGGED)],
        [
            Talk(partial(some_rounds, physical=True), f"{SEED} switched round {n}", hostile=True)
            for n in range(SWITCHED)
        ],
        [Talk(partial(some_torrents, physical=True), f"{SEED} switched torrent {n}") for n in LIMITED],
        [Talk(lambda _: taken_down(), 0)],
        [Talk(lambda _: narrow(), 0)],
        [Talk(some_rounds, f"{SEED} round {n}", hostile=True) for n in CONGESTED],
        [Talk(partial(some_rounds, vlans=True), seed, hostile=True) for seed in COPIED],
        [Talk(some_torrents, seed) for seed in RARE],
        [Talk(some_dialogues, seed) for seed in DENIED],
    ]
    return [
        talk
        for begin, end in pairwise((0, 1 / 16, 1 / 4, 1))
        for kind in kinds
        for talk in kind[ceil(len(kind) * begin) : ceil(len(kind) * end)]
    ]


@pytest.fixture(scope="module")
def script() -> Iterator[list[Operation]]:
    """What all machines must do, from their first tables on."""
    with devices(NAME) as found:
        teller = Teller(found)
        operations: list[Operation] = []
        for talk in talks():
            rng = random.Random(talk.seed)
            teller.share = talk.share
            operations += teller.tell(talk.draw(rng), rng if talk.hostile else None, talk.sweep)
        yield operations


def taken_down() -> list[Step]:
    """A machine that is disabled, as host ports are that run agents, and comes back."""
    up = tower(2)
    down = up.with_(replace(up.machines[2], enabled=False))
    return [Step(START, world, 3, across(up, 2)) for world in (up, down, up)]


def narrow() -> list[Step]:
    """What fits the sender's segment, and not the transparent one behind the router."""
    world = detour(1)
    world = world.with_(replace(world.segments[world.ports[2].segment], transparent=True))
    first, second = world.ports[1], world.ports[2]
    ends = pk.mapped(first.addresses[0]), pk.mapped(second.addresses[0])
    payloads = [udp(*ends, 1000, 53, bytes(size - 28)) for size in (1442, 1443)]
    router = world.routers_of(first.segment)[0].mac
    return [Step(START, world, 1, ip_frame(router, first.mac, *ends, pk.UDP, payload)) for payload in payloads]


def survives(script: list[Operation], object: Path) -> int | None:
    """The number of the first operation that goes wrong; None if all go right."""
    with recording(NAME, object) as kernels:
        for number, operation in enumerate(script):
            try:
                play(operation, kernels)
            except Mismatch:
                return number
    return None


def test_without_a_fault_all_goes_right(script: list[Operation]) -> None:
    assert survives(script, build.object_path()) is None


@contextmanager
def mutant(fault: Fault, tmp_path: Path) -> Iterator[Path]:
    """The object with this fault."""
    sources = tmp_path / "bpf"
    shutil.copytree(build.SOURCES, sources)
    source = (sources / fault.file).read_text()
    assert source.count(fault.right) == 1, "the line is another now: change the fault with it"
    (sources / fault.file).write_text(source.replace(fault.right, fault.wrong))
    object = build.object_path(sources)
    try:
        yield object
    finally:
        object.unlink()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(fault: Fault, script: list[Operation], tmp_path: Path) -> None:
    with mutant(fault, tmp_path) as object:
        assert survives(script, object) is not None, f"nothing found {fault}"


@pytest.mark.parametrize("field_", [6], indirect=True, ids=["over-ipv6"])
@pytest.mark.parametrize("fault", HOSTILE_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_that_only_hostile_frames_show_is_found(fault: Fault, field_: Field, tmp_path: Path) -> None:
    with mutant(fault, tmp_path) as object:
        try:
            change(field_, object)
            with pytest.raises(AssertionError):
                onslaught(field_, SHARE)
        finally:
            change(field_, build.object_path())


@pytest.mark.parametrize("field_", [6], indirect=True, ids=["over-ipv6"])
def test_without_a_fault_hostile_frames_go_right(field_: Field) -> None:
    onslaught(field_, SHARE)
