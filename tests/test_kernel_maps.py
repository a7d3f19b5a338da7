"""The kernel datapath's maps, pins and links on the real kernel, without what the programs do with a frame.

Programs of two instructions stand in for the real ones where only their place matters: they are compiled against the
real headers, so the maps are the real ones.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nestnet.agent import links, netns
from nestnet.compile.diff import Bump, Delete, Epoch, Put, diff
from nestnet.compile.tables import GENERATIONS, LAYOUT, TABLES, Rows, Table, Tables, empty, ordered
from nestnet.datapath import build
from nestnet.datapath.kernel import BPFFS, RECORD, Capacity, Kernel, ProgramName, Record, check_layout
from nestnet.datapath.libbpf import Link, LoadError, Map, Object, Program, get, on_hook
from nestnet.model.connections import OTHER_SECONDS, TCP_CLOSING_SECONDS, TCP_SECONDS
from nestnet.model.errors import Conflict, Exhausted, NestnetError
from nestnet.model.reasons import NUMBERS

pytestmark = pytest.mark.root

SMALL = Capacity(
    *(64, 64, 64, 64, 64, 64),  # slots
    *(4096, 4096, 4096, 4096, 4096),
    *(256, 256, 64),
    64,
)

PLAIN = """
#include "state.h"
SEC("tcx/ingress") int workload(struct __sk_buff *skb) { return ANSWER + recording; }
SEC("tcx/ingress") int underlay(struct __sk_buff *skb) { return TC_ACT_OK; }
SEC("tcx/egress") int tag(struct __sk_buff *skb) { return TC_ACT_NEXT; }
SEC("tcx/ingress") int trunk(struct __sk_buff *skb) { return TC_ACT_NEXT; }
char _license[] SEC("license") = "GPL";
"""


def compiled(folder: Path, text: str = PLAIN, answer: int = 0) -> Path:
    """An object with the real maps and these programs. `answer` makes two that differ."""
    folder.mkdir(exist_ok=True)
    for header in build.SOURCES.glob("*.h"):
        (folder / header.name).write_bytes(header.read_bytes())
    (folder / build.MAIN).write_text(text)
    return build.object_path(folder, {"ANSWER": answer})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("bpf"))


@pytest.fixture
def pins() -> Iterator[Path]:
    folder = BPFFS / f"nntest-{uuid.uuid4().hex[:8]}"
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if folder.exists():
        folder.rmdir()


@pytest.fixture
def kernel(pins: Path, plain: Path) -> Iterator[Kernel]:
    with Kernel.open(pins, SMALL, object=plain) as opened:
        yield opened


def canonical(table: Table, rows: Rows) -> Rows:
    """Rows as the compiler would give them: every key once, the last one counting; canonical bits behind a prefix."""
    rows = rows.copy()
    if table.kind == "lpm":
        assert table.key is not None
        bits = 8 * (table.key.itemsize - 4)
        rows["key"]["prefixlen"] %= bits + 1
        for row in rows:
            raw = bytearray(row["key"].tobytes())
            length = int(row["key"]["prefixlen"])
            data = int.from_bytes(raw[4:], "big") >> (bits - length) << (bits - length)
            row["key"] = np.frombuffer(raw[:4] + data.to_bytes(bits // 8, "big"), table.key)[0]
    if table.kind == "array":
        rows["key"] = rows["key"] % 64
        if "id" in (table.value.names or ()):
            rows = rows[rows["value"]["id"] != 0]
        else:
            rows["key"] = 0
            rows = rows[[any(row["value"].tobytes()) for row in rows]]
    last = {row["key"].tobytes(): at for at, row in enumerate(rows)}
    return ordered(table, rows[sorted(last.values())])


def some_rows(table: Table) -> st.SearchStrategy[Rows]:
    """Any bytes at all as rows, a few of them alike."""
    size = table.row.itemsize
    pieces = st.one_of(st.binary(min_size=size, max_size=size), st.sampled_from([bytes(size), b"\1" * size]))
    return st.lists(pieces, max_size=40).map(lambda rows: canonical(table, np.frombuffer(b"".join(rows), table.row)))


def assert_equal(have: Tables, want: Tables) -> None:
    for name in TABLES:
        assert have[name].dtype == want[name].dtype
        assert have[name].tobytes() == want[name].tobytes(), name


# ---- the object


def test_dtypes_are_what_c_says(plain: Path) -> None:
    check_layout(Object(plain))


def test_a_field_that_moved_is_named(tmp_path: Path) -> None:
    compiled(tmp_path / "bpf")
    header = tmp_path / "bpf" / "tables.h"
    before = header.read_text()
    header.write_text(before.replace("struct vni { u32 segment; };", "struct vni { u32 pad, segment; };"))
    assert header.read_text() != before
    with pytest.raises(LoadError) as caught:
        check_layout(Object(build.object_path(tmp_path / "bpf", {"ANSWER": 0})))
    assert "vni value: 8 bytes in C, 4 in Python" in str(caught.value)
    assert "field segment: 4 bytes at 4 in C, 4 at 0 in Python" in str(caught.value)


def test_the_real_object_has_the_tables() -> None:
    check_layout(Object(build.object_path()))


def test_a_record_begins_as_python_reads_it(tmp_path: Path) -> None:
    """No map has records for values, so they are not in BTF: the compiler is asked."""
    offsets = {"kind": 0, "slot": 4, "what": 8, "length": 12, "data": RECORD.size}
    asked = [f'_Static_assert(__builtin_offsetof(struct record, {n}) == {at}, "{n}");' for n, at in offsets.items()]
    compiled(tmp_path / "bpf", "\n".join([PLAIN, *asked, ""]))


def test_reasons_are_the_models(plain: Path) -> None:
    text = (plain.parent / "include" / "reasons.h").read_text()
    for name, number in NUMBERS.items():
        assert f"REASON_{name.upper()} = {number}," in text


def test_a_current_object_is_not_built_again(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: ["/does/not/exist"])
    folder = tmp_path / "bpf"
    assert compiled(folder) == plain
    with pytest.raises(build.BuildError, match="cannot run /does/not/exist"):
        compiled(folder, answer=int(time.time()))


def test_what_the_compiler_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match=r"nestnet\.bpf\.c:1:.*error"):
        compiled(tmp_path / "bpf", f"nonsense {uuid.uuid4()};")


def test_no_object_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.o").write_bytes(b"no object")
    with pytest.raises(LoadError, match=r"x\.o is no BPF object"):
        Object(tmp_path / "x.o")


def test_what_the_verifier_refuses_is_told(tmp_path: Path, pins: Path) -> None:
    bad = PLAIN.replace("return TC_ACT_OK;", "return *(int *)(u64)skb->data;")
    with pytest.raises(LoadError) as caught:
        Kernel.open(pins, SMALL, object=compiled(tmp_path / "bpf", bad))
    assert "does not load" in str(caught.value)
    assert "invalid access to packet" in str(caught.value)
    assert len(str(caught.value).splitlines()) < 50
    # Nothing stays that the next one could take for a datapath.
    assert not (pins / f"v{LAYOUT}" / "object").is_symlink()


# ---- tables


@pytest.mark.parametrize("name", TABLES)
def test_rows_come_back_as_they_were_written(name: str, kernel: Kernel) -> None:
    table = TABLES[name]
    states = st.tuples(some_rows(table), some_rows(table))

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(states)
    def law(pair: tuple[Rows, Rows]) -> None:
        for rows in (*pair, np.zeros(0, table.row)):
            have = kernel.read()
            want = empty() | {name: rows}
            # Any bytes may be a slot that no counter has.
            kernel.apply([action for action in diff(have, want) if isinstance(action, Put | Delete)])
            assert_equal(kernel.read(), want)

    law()


def test_deleting_what_is_gone_is_no_error(kernel: Kernel) -> None:
    table = TABLES["vni"]
    rows = np.zeros(5, table.row)
    rows["key"]["vni"] = [1, 2, 3, 4, 5]
    rows["value"]["segment"] = 7
    kernel.apply([Put("vni", rows), Delete("vni", rows["key"][[0, 3]])])
    kernel.apply([Delete("vni", rows["key"])])
    assert len(kernel.read()["vni"]) == 0


def test_a_full_table_says_so(kernel: Kernel) -> None:
    rows = np.zeros(65, TABLES["attach"].row)
    rows["key"]["ifindex"] = np.arange(65)
    with pytest.raises(Exhausted, match="table attach has room for 64 rows") as caught:
        kernel.apply([Put("attach", rows)])
    assert caught.value.limit == 64
    beyond = np.zeros(1, TABLES["port"].row)
    beyond["key"] = 65
    with pytest.raises(Exhausted, match="table port has room for 65 rows"):
        kernel.apply([Put("port", beyond)])


def test_counters_only_rise(kernel: Kernel) -> None:
    few, many = np.array([3, 5, 3], "u4"), np.arange(1, 65, dtype="u4")
    for _ in range(3):
        kernel.apply([Bump("port", few), Epoch()])
    kernel.apply([Bump("port", np.concatenate([many, few])), Bump("host", few[:1])])
    counted = kernel.rows("generation_port")["value"]
    assert (int(counted[0]), int(counted[1]), int(counted[3]), int(counted[5])) == (0, 1, 4, 4)
    assert int(kernel.rows("generation_host")["value"][3]) == 1
    assert int(kernel.rows("epoch")["value"][0]) == 3
    with pytest.raises(Exhausted):
        kernel.apply([Bump("machine", np.array([65], "u4"))])


def test_every_counter_has_its_map(kernel: Kernel) -> None:
    kernel.apply([Bump(name, np.array([1], "u4")) for name in GENERATIONS])


def test_hundreds_of_thousands_of_rows_take_seconds(pins: Path, plain: Path) -> None:
    rows = np.zeros(200_000, TABLES["rule"].row)
    rows["key"]["source"] = np.arange(len(rows))
    rows["value"]["rank"] = np.arange(len(rows))
    with Kernel.open(pins, replace(SMALL, rules=len(rows)), object=plain) as kernel:
        started = time.monotonic()
        kernel.apply([Put("rule", rows)])
        assert kernel.read()["rule"].tobytes() == ordered(TABLES["rule"], rows).tobytes()
        assert time.monotonic() - started < 5


# ---- pins


def test_an_agent_after_another_finds_everything(pins: Path, plain: Path) -> None:
    rows = np.zeros(1, TABLES["network"].row)
    rows["key"], rows["value"]["id"] = 9, 1234567890123
    with Kernel.open(pins, SMALL, object=plain) as first:
        first.apply([Put("network", rows), Bump("policy", np.array([9], "u4")), Epoch()])
        programs = {name: get(pins / f"v{LAYOUT}" / name) for name in ("workload", "underlay")}
    with Kernel.open(pins, SMALL, object=plain) as second:
        assert_equal(second.read(), empty() | {"network": rows})
        assert int(second.rows("generation_policy")["value"][9]) == 1
        assert {n: Program(get(pins / f"v{LAYOUT}" / n)).id for n in programs} == {
            n: Program(f).id for n, f in programs.items()
        }
        second.unpin()
    assert not (pins / f"v{LAYOUT}").exists()


def test_only_one_writes(pins: Path, plain: Path, kernel: Kernel) -> None:
    with pytest.raises(Conflict, match="another process writes"):
        Kernel.open(pins, SMALL, object=plain)
    with Kernel.open(pins, object=plain, read_only=True) as looking:
        assert_equal(looking.read(), empty())
        with pytest.raises(NestnetError, match="for looking only"):
            looking.apply([Epoch()])
    kernel.close()
    Kernel.open(pins, SMALL, object=plain).close()


def test_nothing_to_look_at_is_told(pins: Path, plain: Path) -> None:
    with pytest.raises(NestnetError, match="no datapath is pinned"):
        Kernel.open(pins, object=plain, read_only=True)
    assert not pins.exists()


def test_pins_elsewhere_are_refused(tmp_path: Path, plain: Path) -> None:
    with pytest.raises(NestnetError, match="in no BPF file system"):
        Kernel.open(tmp_path, object=plain)


def test_half_a_start_is_finished_by_the_next(pins: Path, plain: Path) -> None:
    Kernel.open(pins, SMALL, object=plain).close()
    for name in ("object", "underlay", "rule", "epoch"):  # as if it had been killed before it came to these
        (pins / f"v{LAYOUT}" / name).unlink()
    with Kernel.open(pins, SMALL, object=plain) as kernel:
        assert_equal(kernel.read(), empty())
        kernel.apply([Epoch()])


def test_another_layout_under_the_same_version_is_refused(pins: Path, plain: Path, tmp_path: Path) -> None:
    with Kernel.open(pins, SMALL, object=plain):
        pass
    (pins / f"v{LAYOUT}" / "object").unlink()
    (pins / f"v{LAYOUT}" / "flow").unlink()
    (pins / f"v{LAYOUT}" / "carriage").rename(pins / f"v{LAYOUT}" / "flow")
    with pytest.raises(LoadError, match="map flow has entries of 12 bytes where 44 are meant"):
        Kernel.open(pins, SMALL, object=plain)


# ---- links


@pytest.fixture
def room() -> Iterator[Path]:
    """A namespace with two interfaces, one pair: va and vb."""
    name = f"nntest-{uuid.uuid4().hex[:8]}"
    path = netns.create(name)
    try:
        pair = ["ip", "link", "add", "va", "type", "veth", "peer", "name", "vb"]
        netns.run_in(path, lambda: subprocess.check_call(pair))
        yield path
    finally:
        netns.delete(name)


def index(room: Path, name: str) -> int:
    def find() -> int:
        with links.netlink() as ipr:
            found = links.find(ipr, name)
        assert found is not None
        return found.index

    return netns.run_in(room, find)


def hooked(room: Path, name: str) -> list[str]:
    """The programs on an interface's ingress hook, as the kernel says."""
    return netns.run_in(room, lambda: on_hook(index(room, name)))


def answer(kernel: Kernel, room: Path, program: ProgramName = "workload") -> int:
    return netns.run_in(room, lambda: kernel.run(bytes(60), index(room, "va"), program).answer)


def test_a_program_is_where_it_was_put(kernel: Kernel, room: Path) -> None:
    a, b = index(room, "va"), index(room, "vb")
    netns.run_in(room, lambda: kernel.attach(a, "workload"))
    netns.run_in(room, lambda: kernel.attach(b, "underlay"))
    assert (hooked(room, "va"), hooked(room, "vb")) == (["workload"], ["underlay"])
    assert kernel.attached() == {a: "workload", b: "underlay"}
    netns.run_in(room, lambda: kernel.attach(a, "underlay"))
    assert hooked(room, "va") == ["underlay"]
    kernel.detach(a)
    kernel.detach(a)
    assert hooked(room, "va") == []
    assert kernel.attached() == {b: "underlay"}
    with pytest.raises(OSError, match="attach workload to interface 9999"):
        kernel.attach(9999, "workload")


def test_programs_stay_when_their_agent_ends(pins: Path, plain: Path, room: Path) -> None:
    a = index(room, "va")
    with Kernel.open(pins, SMALL, object=plain) as first:
        netns.run_in(room, lambda: first.attach(a, "workload"))
    assert hooked(room, "va") == ["workload"]
    with Kernel.open(pins, SMALL, object=plain) as second:
        assert second.attached() == {a: "workload"}
        second.unpin()
    assert hooked(room, "va") == []


def test_another_object_takes_the_place_of_the_old(pins: Path, plain: Path, room: Path, tmp_path: Path) -> None:
    """New programs on the same maps: nothing forgotten, and never two or none on the hook."""
    a = index(room, "va")
    rows = np.zeros(1, TABLES["vni"].row)
    rows["key"]["vni"] = 77
    with Kernel.open(pins, SMALL, object=plain) as first:
        first.apply([Put("vni", rows), Epoch()])
        netns.run_in(room, lambda: first.attach(a, "workload"))
        assert answer(first, room) == 0
    with contextlib.closing(Link(get(pins / f"v{LAYOUT}" / f"link_{a}"))) as link:
        before = link.program
        with Kernel.open(pins, SMALL, object=compiled(tmp_path / "bpf", answer=2)) as second:
            assert link.program not in (0, before)
            assert hooked(room, "va") == ["workload"]
            assert answer(second, room) == 2
            assert second.read()["vni"].tobytes() == rows.tobytes()
            assert int(second.rows("epoch")["value"][0]) == 1
        pinned = Program(get(pins / f"v{LAYOUT}" / "workload"))
        assert pinned.id == link.program


def test_an_interface_that_went_is_forgotten(pins: Path, plain: Path, room: Path, tmp_path: Path) -> None:
    a = index(room, "va")
    with Kernel.open(pins, SMALL, object=plain) as first:
        netns.run_in(room, lambda: first.attach(a, "workload"))
        netns.run_in(room, lambda: subprocess.check_call(["ip", "link", "del", "va"]))
        assert first.attached() == {}
        # Its number comes up again.
        again = ["ip", "link", "add", "va", "index", str(a), "type", "veth", "peer", "name", "vb"]
        netns.run_in(room, lambda: subprocess.check_call(again))
        netns.run_in(room, lambda: first.attach(a, "underlay"))
        assert hooked(room, "va") == ["underlay"]
        netns.run_in(room, lambda: subprocess.check_call(["ip", "link", "del", "va"]))
    with Kernel.open(pins, SMALL, object=compiled(tmp_path / "bpf", answer=3)):
        assert not (pins / f"v{LAYOUT}" / f"link_{a}").exists()


def test_the_link_of_another_layout_is_taken_over(pins: Path, plain: Path, room: Path) -> None:
    a = index(room, "va")
    with Kernel.open(pins, SMALL, object=plain) as first:
        netns.run_in(room, lambda: first.attach(a, "workload"))
    (pins / f"v{LAYOUT}").rename(pins / "v0")
    with Kernel.open(pins, SMALL, object=plain) as second:
        netns.run_in(room, lambda: second.attach(a, "workload"))
        assert second.attached() == {a: "workload"}
        assert hooked(room, "va") == ["workload"]
        assert not (pins / "v0" / f"link_{a}").exists()


def test_a_change_cut_off_half_way_makes_all_flows_look_again(pins: Path, plain: Path) -> None:
    def epoch_and_counters(kernel: Kernel) -> tuple[int, set[int]]:
        counters = [kernel.rows(f"generation_{name}")["value"] for name in GENERATIONS]
        return int(kernel.rows("epoch")["value"][0]), set(np.concatenate(counters).tolist())

    full = np.zeros(65, TABLES["attach"].row)
    full["key"]["ifindex"] = np.arange(65)
    with Kernel.open(pins, SMALL, object=plain) as kernel:
        with pytest.raises(Exhausted):
            kernel.apply([Put("attach", full), Epoch()])
        assert epoch_and_counters(kernel) == (1, {1})
        (pins / f"v{LAYOUT}" / "unfinished").symlink_to("apply")  # as if it had been killed now
    with Kernel.open(pins, SMALL, object=plain) as kernel:
        assert epoch_and_counters(kernel) == (2, {2})
        assert not (pins / f"v{LAYOUT}" / "unfinished").is_symlink()
        kernel.apply([])
        kernel.apply([Epoch()])
        assert epoch_and_counters(kernel) == (3, {2})


# ---- what others did


def test_pins_of_tables_that_are_missing_mean_all_anew(pins: Path, plain: Path, room: Path) -> None:
    """Some rows without others could open what a policy closes: without the deny's table the allow's would do."""
    a = index(room, "va")
    rows = np.zeros(1, TABLES["vni"].row)
    rows["key"]["vni"] = 77
    with Kernel.open(pins, SMALL, object=plain) as kernel:
        kernel.apply([Put("vni", rows), Epoch()])
        netns.run_in(room, lambda: kernel.attach(a, "workload"))
    (pins / f"v{LAYOUT}" / "workload").unlink()  # programs are in the object
    with Kernel.open(pins, SMALL, object=plain) as kernel:
        assert kernel.read()["vni"].tobytes() == rows.tobytes()
    (pins / f"v{LAYOUT}" / "peer").unlink()
    with Kernel.open(pins, SMALL, object=plain) as kernel:
        assert_equal(kernel.read(), empty())
        assert kernel.attached() == {a: "workload"}
        assert hooked(room, "va") == ["workload"]
    (pins / f"v{LAYOUT}" / "opened").unlink()
    with Kernel.open(pins, SMALL, object=plain) as kernel:
        assert_equal(kernel.read(), empty())


def row(table: Table, number: int, value: int) -> Rows:
    """One whose key ends in this byte, and whose value is made of that."""
    one = np.zeros(1, table.row)
    one["value"] = np.frombuffer(bytes([value]) * table.value.itemsize, table.value)
    if table.key is None:
        one["key"] = number
    else:
        one["key"] = np.frombuffer(bytes(table.key.itemsize - 1) + bytes([number]), table.key)
        if table.kind == "lpm":
            one["key"]["prefixlen"] = 8 * (table.key.itemsize - 4)
    return one


@pytest.mark.parametrize("name", [name for name in TABLES if name != "self"])
def test_rows_that_others_wrote_are_found_and_put_right(name: str, kernel: Kernel) -> None:
    table = TABLES[name]
    kernel.apply([Put(name, np.concatenate([row(table, number, 1) for number in range(3)])), Epoch()])
    want = kernel.read()
    assert kernel.drifted(want) == []
    for what in (Delete(name, row(table, 0, 1)["key"]), row(table, 1, 2), row(table, 9, 1)):
        if isinstance(what, Delete):
            kernel._do(what)
        else:
            put(kernel, name, what)
        assert kernel.drifted(want) == [name], what
        before = int(kernel.rows("epoch")["value"][0])
        kernel.restore(want)
        assert_equal(kernel.read(), want)
        assert kernel.drifted(want) == []
        assert int(kernel.rows("epoch")["value"][0]) == before + 1


def test_counters_that_others_wrote_are_found_and_raised(kernel: Kernel) -> None:
    kernel.apply([Bump("port", np.array([3], "u4")), Epoch()])
    rows = kernel.rows("generation_port")[3:4].copy()
    rows["value"] = 0
    put(kernel, "generation_port", rows)
    want = kernel.read()
    assert kernel.drifted(want) == ["generation_port"]
    kernel.restore(want)
    assert kernel.drifted(want) == []
    assert int(kernel.rows("generation_port")["value"][3]) == 2


def test_attaching_says_whether_it_was_off(kernel: Kernel, room: Path) -> None:
    a = index(room, "va")

    def attach() -> bool:
        return netns.run_in(room, lambda: kernel.attach(a, "workload"))

    assert attach()
    assert not attach()
    with contextlib.closing(Link(get(kernel.folder / f"link_{a}"))) as link:
        link.detach()
    assert hooked(room, "va") == []
    assert attach()
    assert hooked(room, "va") == ["workload"]
    (kernel.folder / f"link_{a}").unlink()
    assert hooked(room, "va") == ["workload"], "it is held"
    assert not attach()
    assert kernel.pinned_again() == 1
    assert kernel.attached() == {a: "workload"}
    kernel.detach(a)
    assert (hooked(room, "va"), kernel.attached()) == ([], {})


def test_a_folder_that_is_gone_is_made_again(pins: Path, plain: Path, room: Path) -> None:
    a = index(room, "va")
    rows = np.zeros(1, TABLES["vni"].row)
    with Kernel.open(pins, SMALL, object=plain) as first:
        first.apply([Put("vni", rows), Epoch()])
        first.store = "ours"
        netns.run_in(room, lambda: first.attach(a, "workload"))
        before = sorted(path.name for path in first.folder.iterdir())
        for path in first.folder.iterdir():
            path.unlink()
        first.folder.rmdir()
        assert first.pinned_again() == len(before) - 2  # and two symbolic links
        assert sorted(path.name for path in first.folder.iterdir()) == before
        with pytest.raises(Conflict):
            Kernel.open(pins, SMALL, object=plain)
    with Kernel.open(pins, SMALL, object=plain) as second:
        assert second.read()["vni"].tobytes() == rows.tobytes()
        assert (second.store, second.attached()) == ("ours", {a: "workload"})


def test_a_layout_that_no_hook_uses_is_freed(pins: Path, plain: Path, room: Path) -> None:
    a, b = index(room, "va"), index(room, "vb")
    with Kernel.open(pins, SMALL, object=plain) as first:
        for one in (a, b):
            netns.run_in(room, lambda one=one: first.attach(one, "workload"))  # type: ignore[misc]
    (pins / f"v{LAYOUT}").rename(pins / "v0")
    with Kernel.open(pins, SMALL, object=plain) as second:
        assert second.attached() == {a: "workload", b: "workload"}
        netns.run_in(room, lambda: second.attach(a, "workload"))
        second.forget_others()
        assert (pins / "v0").exists(), "b's hook is from there"
        second.detach(b)
        assert hooked(room, "vb") == []
        second.forget_others()
        assert [path.name for path in pins.iterdir()] == [f"v{LAYOUT}"]
        assert hooked(room, "va") == ["workload"]


# ---- what programs remember and count


def put(kernel: Kernel, name: str, rows: Rows) -> None:
    """As a program would."""
    with contextlib.closing(Map(get(kernel.folder / name), rows["key"].dtype, rows["value"].dtype)) as opened:
        opened.update(rows["key"], rows["value"])


def test_what_is_over_is_swept(kernel: Kernel) -> None:
    now = 1_000_000
    cases = [  # protocol, closing, seconds since, goes
        *((6, 0, TCP_SECONDS - 1, False), (6, 0, TCP_SECONDS, True)),
        *((6, 1, TCP_CLOSING_SECONDS - 1, False), (6, 1, TCP_CLOSING_SECONDS, True)),
        *((17, 0, OTHER_SECONDS - 1, False), (17, 0, OTHER_SECONDS, True), (1, 1, OTHER_SECONDS, True)),
        (6, 0, -5, False),
    ]
    rows = np.zeros(len(cases), kernel.connections().dtype)
    rows["key"]["source"] = 1 + np.arange(len(cases)) % 2
    rows["key"]["tuple"]["source_port"] = np.arange(len(cases))
    for row, (protocol, closing, since, _) in zip(rows, cases, strict=True):
        row["key"]["tuple"]["protocol"] = protocol
        row["value"]["closing"], row["value"]["seen"] = closing, now - since
    put(kernel, "connection", rows)

    flows = np.zeros(3, kernel.flows().dtype)
    flows["key"]["where"] = [1, 2, 3]
    flows["value"]["seen"] = [now, now - 59, now - 60]
    flows["value"]["a"], flows["value"]["b"] = [1, 1, 2], [2, 3, 2]
    put(kernel, "flow", flows)
    pairs = np.zeros(4, kernel.rows("carriage").dtype)
    pairs["key"]["a"], pairs["key"]["b"] = [1, 1, 2, 2], [2, 3, 2, 1]
    put(kernel, "carriage", pairs)
    fragments = np.zeros(2, kernel.rows("fragment").dtype)
    fragments["key"]["id"], fragments["value"]["seen"] = [1, 2], [now - 29, now - 30]
    put(kernel, "fragment", fragments)

    assert kernel.sweep(now) == {"connection": 4, "fragment": 1, "flow": 1, "carriage": 2}
    stay = {number for number, case in enumerate(cases) if not case[-1]}
    assert set(kernel.connections()["key"]["tuple"]["source_port"].tolist()) == stay
    assert kernel.rows("closed")["value"][:3].tolist() == [0, 1, 3]
    assert sorted(kernel.flows()["key"]["where"].tolist()) == [1, 2]
    assert sorted(map(tuple, kernel.rows("carriage")["key"].tolist())) == [(1, 2, 0), (1, 3, 0)]
    assert sum(kernel.sweep(now).values()) == 0
    kernel.forget()
    assert (len(kernel.flows()), len(kernel.connections()), int(kernel.rows("closed")["value"].sum())) == (0, 0, 0)


RECORDING = PLAIN.replace(
    "{ return ANSWER + recording; }",
    """{
    struct drops_key key = { 7, 3 };
    u64 one = 1;
    u32 slot = 5;
    struct stats *s = bpf_map_lookup_elem(&stats, &slot);

    if (s) { s->out_packets += 1; s->out_bytes += skb->len; }
    bpf_map_update_elem(&drops, &key, &one, BPF_ANY);
    if (recording) for (u32 i = 0; i < 2; i++) {
        struct record *r = bpf_ringbuf_reserve(&emitted, sizeof(*r), 0);
        if (!r) return 9;
        r->kind = i ? RECORD_DROP : RECORD_WORKLOAD;
        r->slot = 5;
        r->what = skb->ifindex;
        r->length = 60;
        bpf_skb_load_bytes(skb, 0, r->data, 60);
        bpf_ringbuf_submit(r, 0);
    }
    return ANSWER + recording;
}""",
)


def test_a_run_tells_what_would_be_sent(pins: Path, room: Path, tmp_path: Path) -> None:
    a, frame = index(room, "va"), bytes(range(60))
    path = compiled(tmp_path / "bpf", RECORDING)
    with Kernel.open(pins, SMALL, recording=True, object=path) as kernel:
        for _ in range(3):
            result = netns.run_in(room, lambda: kernel.run(frame, a, "workload"))
            assert (result.answer, result.frame) == (1, frame)
            assert result.emitted == (Record("workload", 5, a, 60, frame), Record("drop", 5, a, 60, b""))
        assert kernel.drops() == {(7, 3): 1}
        counted = kernel.stats()
        assert counted["key"].tolist() == [5]
        assert counted["value"][0].tolist() == (3, 180, 0, 0)
    # Recording or not is another identity: the same object is loaded again.
    with Kernel.open(pins, SMALL, object=path) as kernel:
        result = netns.run_in(room, lambda: kernel.run(frame, a, "workload"))
        assert (result.answer, result.emitted) == (0, ())


# ---- the real programs


def test_the_real_programs_load(pins: Path, room: Path) -> None:
    with Kernel.open(pins, SMALL, recording=True) as kernel:
        assert_equal(kernel.read(), empty())
        a = index(room, "va")
        dropped = netns.run_in(room, lambda: kernel.run(bytes(60), a, "workload"))
        assert [(r.kind, r.what) for r in dropped.emitted] == [("drop", NUMBERS["not_attached"])]
        assert kernel.drops() == {(0, NUMBERS["not_attached"]): 1}
