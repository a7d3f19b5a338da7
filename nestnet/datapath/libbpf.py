"""A thin typed binding of libbpf (libbpf.so.1, from 1.1): objects, maps in batches, programs, tcx links, a ring buffer.

Only what the datapath needs, and no policy of its own: `kernel.py` says what is loaded and where it is pinned. What
the kernel refuses is raised as OSError; an object that does not load as `LoadError`, with the verifier's last words.

Keys and values of maps are numpy arrays, one row an entry, handed to the kernel as they lie in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import threading
from collections.abc import Iterator, Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nestnet.datapath.btf import Btf, Dtype
from nestnet.model.errors import NestnetError

BPF_NOEXIST = 1  # <linux/bpf.h>

Array = npt.NDArray[np.generic]

# <linux/bpf.h>
HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LPM_TRIE, RINGBUF = 1, 2, 5, 6, 9, 11, 27
SCHED_CLS = 3  # program type of tc and tcx
TCX_INGRESS, TCX_EGRESS = 46, 47  # attach types

LOG_LINES = 30  # of the verifier's log in an error; the rest is in `LoadError.log`
BATCH = 1 << 16  # entries that are read in one call
PACKET = 1 << 16  # the longest frame that a test run gives back


class LoadError(NestnetError):
    """The kernel, or libbpf, refused an object. `log` is everything that libbpf said."""

    def __init__(self, message: str, log: str = "") -> None:
        self.log = log
        super().__init__(message, "datapath_load")


class _OpenOptions(ctypes.Structure):  # the first fields of struct bpf_object_open_opts: libbpf takes any length
    _fields_ = (("sz", c_size_t), ("object_name", c_char_p))


class _BatchOptions(ctypes.Structure):
    _fields_ = (("sz", c_size_t), ("elem_flags", c_uint64), ("flags", c_uint64))


class _TestRunOptions(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_char_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class Context(ctypes.Structure):
    """struct __sk_buff, 192 bytes. A test run takes mark, priority, ifindex, ingress_ifindex, cb and the GSO fields."""

    _fields_ = (
        *(
            (name, c_uint32)
            for name in (
                *("len", "pkt_type", "mark", "queue_mapping", "protocol", "vlan_present", "vlan_tci", "vlan_proto"),
                *("priority", "ingress_ifindex", "ifindex", "tc_index"),
            )
        ),
        ("cb", c_uint32 * 5),
        *((name, c_uint32) for name in ("hash", "tc_classid", "data", "data_end", "napi_id", "family")),
        ("remote_ip4", c_uint32),
        ("local_ip4", c_uint32),
        ("remote_ip6", c_uint32 * 4),
        ("local_ip6", c_uint32 * 4),
        ("remote_port", c_uint32),
        ("local_port", c_uint32),
        ("data_meta", c_uint32),
        ("flow_keys", c_uint64),
        ("tstamp", c_uint64),
        ("wire_len", c_uint32),
        ("gso_segs", c_uint32),
        ("sk", c_uint64),
        ("gso_size", c_uint32),
        ("tstamp_type", c_uint32),
        ("hwtstamp", c_uint64),
    )


class _MapInfo(ctypes.Structure):
    _fields_ = (
        *((n, c_uint32) for n in ("type", "id", "key_size", "value_size", "max_entries", "map_flags")),
        ("name", ctypes.c_char * 16),
    )


class _ProgramInfo(ctypes.Structure):  # to `name`
    _fields_ = (
        ("type", c_uint32),
        ("id", c_uint32),
        ("tag", ctypes.c_ubyte * 8),
        ("jited_prog_len", c_uint32),
        ("xlated_prog_len", c_uint32),
        ("jited_prog_insns", c_uint64),
        ("xlated_prog_insns", c_uint64),
        ("load_time", c_uint64),
        ("created_by_uid", c_uint32),
        ("nr_map_ids", c_uint32),
        ("map_ids", c_uint64),
        ("name", ctypes.c_char * 16),
    )


class _LinkInfo(ctypes.Structure):  # of a tcx link
    _fields_ = tuple((n, c_uint32) for n in ("type", "id", "prog_id", "pad", "ifindex", "attach_type"))


_Print = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)
_Sample = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)

# Name, what it returns, what it takes. Pointers to libbpf's own structs are c_void_p.
_FUNCTIONS: list[tuple[str, object, tuple[object, ...]]] = [
    ("libbpf_set_print", c_void_p, (_Print,)),
    ("bpf_object__open_file", c_void_p, (c_char_p, POINTER(_OpenOptions))),
    ("bpf_object__load", c_int, (c_void_p,)),
    ("bpf_object__close", None, (c_void_p,)),
    ("bpf_object__btf", c_void_p, (c_void_p,)),
    ("btf__raw_data", c_void_p, (c_void_p, POINTER(c_uint32))),
    ("bpf_object__next_map", c_void_p, (c_void_p, c_void_p)),
    ("bpf_map__name", c_char_p, (c_void_p,)),
    ("bpf_map__is_internal", ctypes.c_bool, (c_void_p,)),
    ("bpf_map__fd", c_int, (c_void_p,)),
    ("bpf_map__type", c_int, (c_void_p,)),
    ("bpf_map__key_size", c_uint32, (c_void_p,)),
    ("bpf_map__value_size", c_uint32, (c_void_p,)),
    ("bpf_map__btf_key_type_id", c_uint32, (c_void_p,)),
    ("bpf_map__btf_value_type_id", c_uint32, (c_void_p,)),
    ("bpf_map__set_max_entries", c_int, (c_void_p, c_uint32)),
    ("bpf_map__initial_value", c_void_p, (c_void_p, POINTER(c_size_t))),
    ("bpf_map__reuse_fd", c_int, (c_void_p, c_int)),
    ("bpf_object__next_program", c_void_p, (c_void_p, c_void_p)),
    ("bpf_program__name", c_char_p, (c_void_p,)),
    ("bpf_program__fd", c_int, (c_void_p,)),
    ("bpf_program__set_type", c_int, (c_void_p, c_int)),
    ("bpf_obj_get", c_int, (c_char_p,)),
    ("bpf_obj_pin", c_int, (c_int, c_char_p)),
    ("bpf_obj_get_info_by_fd", c_int, (c_int, c_void_p, POINTER(c_uint32))),
    ("bpf_prog_get_fd_by_id", c_int, (c_uint32,)),
    ("bpf_prog_test_run_opts", c_int, (c_int, POINTER(_TestRunOptions))),
    ("bpf_prog_query", c_int, (c_int, c_int, c_uint32, POINTER(c_uint32), POINTER(c_uint32), POINTER(c_uint32))),
    ("bpf_link_create", c_int, (c_int, c_int, c_int, c_void_p)),
    ("bpf_link_detach", c_int, (c_int,)),
    ("bpf_link_update", c_int, (c_int, c_int, c_void_p)),
    ("bpf_map_update_elem", c_int, (c_int, c_void_p, c_void_p, c_uint64)),
    ("bpf_map_lookup_elem", c_int, (c_int, c_void_p, c_void_p)),
    ("bpf_map_delete_elem", c_int, (c_int, c_void_p)),
    ("bpf_map_get_next_key", c_int, (c_int, c_void_p, c_void_p)),
    ("bpf_map_update_batch", c_int, (c_int, c_void_p, c_void_p, POINTER(c_uint32), POINTER(_BatchOptions))),
    ("bpf_map_delete_batch", c_int, (c_int, c_void_p, POINTER(c_uint32), POINTER(_BatchOptions))),
    (
        "bpf_map_lookup_batch",
        c_int,
        (c_int, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_uint32), POINTER(_BatchOptions)),
    ),
    ("ring_buffer__new", c_void_p, (c_int, _Sample, c_void_p, c_void_p)),
    ("ring_buffer__consume", c_int, (c_void_p,)),
    ("ring_buffer__epoll_fd", c_int, (c_void_p,)),
    ("ring_buffer__free", None, (c_void_p,)),
]

_said: list[str] = []  # what libbpf printed while `_listening`
_listening = threading.Lock()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.vasprintf.argtypes = (POINTER(c_void_p), c_char_p, c_void_p)
_libc.free.argtypes = (c_void_p,)


def _listen(level: int, form: bytes, arguments: int) -> int:
    """libbpf's printer, called with a va_list, which on Linux's ABIs is (or is passed as) a pointer."""
    text = c_void_p()
    if level <= 1 and _libc.vasprintf(byref(text), form, arguments) >= 0:  # warnings and information
        _said.append(ctypes.string_at(text.value or 0).decode(errors="replace"))
        _libc.free(text)
    return 0


_LISTENER = _Print(_listen)  # as long as the library: libbpf keeps the address


@functools.cache
def _lib() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise LoadError(f"libbpf is missing ({error}): install the package libbpf1") from error
    for name, result, arguments in _FUNCTIONS:
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.libbpf_set_print(_LISTENER)
    return lib


@contextlib.contextmanager
def _listened() -> Iterator[list[str]]:
    """What libbpf says meanwhile, from whichever thread."""
    with _listening:
        _said.clear()
        yield _said


def _check(result: int, what: str) -> int:
    """`result` if it is no error; libbpf gives errors as -errno and in errno."""
    if result < 0:
        number = ctypes.get_errno() or -result
        raise OSError(number, os.strerror(number), what)
    return result


def _pointer(array: Array) -> int:
    return int(array.ctypes.data)


@functools.cache
def possible_cpus() -> int:
    """How many CPUs there could be: a per-CPU map has a value for each."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


class Map:
    """A map that is open: its file descriptor, and how its bytes are read.

    `key` and `value` are the dtypes of an entry; without them entries are bytes of the right size. A value of a
    per-CPU map is an array, with a value for each possible CPU.
    """

    def __init__(self, fd: int, key: Dtype | None = None, value: Dtype | None = None, name: str = "") -> None:
        info = _MapInfo()
        _info(fd, info, "map")
        self.fd = fd
        self.name = name or info.name.decode()  # the kernel keeps 15 characters of it
        self.type: int = info.type
        self.max_entries: int = info.max_entries
        self.per_cpu = self.type in (PERCPU_ARRAY, PERCPU_HASH)
        self.key: Dtype = key if key is not None else np.dtype(f"V{info.key_size or 1}")
        self.value: Dtype = value if value is not None else np.dtype(f"V{info.value_size or 1}")
        for ours, size in ((self.key, info.key_size), (self.value, info.value_size)):
            if size and ours.itemsize != size:
                raise LoadError(f"map {self.name} has entries of {size} bytes where {ours.itemsize} are meant")
        # The kernel rounds a per-CPU value up to 8 bytes.
        self._values = np.dtype((np.void, -(-self.value.itemsize // 8) * 8 * possible_cpus())) if self.per_cpu else None

    def close(self) -> None:
        """Give the descriptor back. The map lives on while it is pinned or a program uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def pin(self, path: Path) -> None:
        """Pin it there, where nothing is yet."""
        pin(self.fd, path)

    # ---- many entries at once

    def update(self, keys: Array, values: Array) -> None:
        """Write entries, in order, new ones or over old ones. OSError E2BIG or ENOSPC when the map is full."""
        keys, values = np.ascontiguousarray(keys, self.key), np.ascontiguousarray(values, self.value)
        if len(keys) != len(values):
            raise ValueError("as many keys as values")
        if not len(keys):
            return
        count = c_uint32(len(keys))
        options = _BatchOptions(ctypes.sizeof(_BatchOptions))
        result = _lib().bpf_map_update_batch(self.fd, _pointer(keys), _pointer(values), byref(count), byref(options))
        _check(result, f"write {len(keys)} to map {self.name}")

    def insert(self, keys: Array, values: Array) -> npt.NDArray[np.bool_]:
        """Write those entries whose keys are not there yet, and say which. OSError E2BIG or ENOSPC when it is full."""
        keys, values = np.ascontiguousarray(keys, self.key), np.ascontiguousarray(values, self.value)
        fresh = np.zeros(len(keys), np.bool_)
        for at in range(len(keys)):
            one = slice(at, at + 1)
            result = _lib().bpf_map_update_elem(self.fd, _pointer(keys[one]), _pointer(values[one]), BPF_NOEXIST)
            if result == 0 or ctypes.get_errno() != errno.EEXIST:
                _check(result, f"write to map {self.name}")
                fresh[at] = True
        return fresh

    def delete(self, keys: Array) -> int:
        """Remove entries; one that is not there is no error. How many were there. Arrays cannot: they have no holes."""
        keys = np.ascontiguousarray(keys, self.key)
        at = removed = 0
        options = _BatchOptions(ctypes.sizeof(_BatchOptions))
        while at < len(keys):
            count = c_uint32(len(keys) - at)
            result = _lib().bpf_map_delete_batch(self.fd, _pointer(keys[at:]), byref(count), byref(options))
            # The kernel stops at the first key that is not there; count says before which.
            removed += count.value
            at += count.value
            if result < 0:
                if ctypes.get_errno() != errno.ENOENT:
                    _check(result, f"delete from map {self.name}")
                at += 1
        return removed

    def items(self) -> tuple[Array, Array]:
        """All keys and all values, in the kernel's order. What others change meanwhile may be there or not."""
        stored = self._values if self._values is not None else self.value
        keys: list[Array] = []
        values: list[Array] = []
        room = min(self.max_entries, BATCH)
        token, following = ctypes.create_string_buffer(256), ctypes.create_string_buffer(256)
        options = _BatchOptions(ctypes.sizeof(_BatchOptions))
        first = True
        while True:
            some_keys, some_values = np.zeros(room, self.key), np.zeros(room, stored)
            count = c_uint32(room)
            result = _lib().bpf_map_lookup_batch(
                self.fd,
                None if first else token,
                following,
                _pointer(some_keys),
                _pointer(some_values),
                byref(count),
                byref(options),
            )
            problem = ctypes.get_errno() if result < 0 else 0
            if problem == errno.ENOSPC:  # one bucket of the hash has more than there is room: nothing was read
                room *= 2
                continue
            if problem not in (0, errno.ENOENT):
                _check(result, f"read map {self.name}")
            keys.append(some_keys[: count.value])
            values.append(some_values[: count.value])
            if problem == errno.ENOENT:
                break
            token.raw, first = following.raw, False
        # Without a dtype numpy would make one up, without the padding.
        return np.concatenate(keys, dtype=self.key), self._per_cpu(np.concatenate(values, dtype=stored))

    def _per_cpu(self, stored: Array) -> Array:
        if self._values is None:
            return stored
        each = self._values.itemsize // possible_cpus()
        parts = np.frombuffer(stored.tobytes(), "u1").reshape(len(stored), possible_cpus(), each)
        parts = np.ascontiguousarray(parts[:, :, : self.value.itemsize])
        return parts.view(self.value).reshape(len(stored), possible_cpus())

    # ---- one entry

    def lookup(self, key: Array) -> Array | None:
        """The value of one key (an array of one), as an array of one; None if it is not there."""
        key = np.ascontiguousarray(key, self.key)
        found = np.zeros(1, self._values if self._values is not None else self.value)
        result = _lib().bpf_map_lookup_elem(self.fd, _pointer(key), _pointer(found))
        if result < 0 and ctypes.get_errno() == errno.ENOENT:
            return None
        _check(result, f"read map {self.name}")
        return self._per_cpu(found)

    def keys(self) -> Iterator[Array]:
        """Every key, one call each: for types of map that have no batches."""
        key: Array | None = None
        while True:
            following = np.zeros(1, self.key)
            at = None if key is None else _pointer(key)
            result = _lib().bpf_map_get_next_key(self.fd, at, _pointer(following))
            if result < 0 and ctypes.get_errno() == errno.ENOENT:
                return
            _check(result, f"read map {self.name}")
            key = following
            yield key


@dataclass(frozen=True)
class TestRun:
    """What a program did with a frame: its answer (TC_ACT_*), the frame as it left it, the context, and how many
    nanoseconds it took, on average if it was repeated."""

    __test__ = False  # no test class, whatever pytest thinks of its name

    answer: int
    frame: bytes
    context: Context
    nanoseconds: int


class Program:
    """A loaded program."""

    def __init__(self, fd: int) -> None:
        info = _ProgramInfo()
        _info(fd, info, "program")
        self.fd = fd
        self.id: int = info.id
        self.name = info.name.decode()

    @classmethod
    def of_id(cls, number: int) -> Program:
        """The program with this number of the kernel's. OSError ENOENT if it is gone."""
        return cls(_check(_lib().bpf_prog_get_fd_by_id(number), f"program {number}"))

    def close(self) -> None:
        """Give the descriptor back. The program lives on while it is pinned or attached."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def test_run(self, frame: bytes, context: Context | None = None, repeat: int = 1) -> TestRun:
        """Run it on a frame, as if that came in at `context.ifindex` of the calling thread's network namespace. Only a
        frame that the program leaves as it is can be repeated: the kernel does not copy it anew."""
        given, after = context or Context(), Context()
        out = ctypes.create_string_buffer(max(PACKET, 2 * len(frame)))
        size = ctypes.sizeof(Context)
        options = _TestRunOptions(
            sz=ctypes.sizeof(_TestRunOptions),
            data_in=frame,
            data_out=ctypes.addressof(out),
            data_size_in=len(frame),
            data_size_out=len(out),
            ctx_in=ctypes.addressof(given),
            ctx_out=ctypes.addressof(after),
            ctx_size_in=size,
            ctx_size_out=size,
            repeat=repeat,
        )
        _check(_lib().bpf_prog_test_run_opts(self.fd, byref(options)), f"run program {self.name}")
        answer = options.retval - (1 << 32) if options.retval >> 31 else options.retval
        return TestRun(answer, out.raw[: options.data_size_out], after, options.duration)


class Link:
    """A program on a tcx hook of an interface. Pinned, it outlives the process."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, program: Program, ifindex: int, hook: int = TCX_INGRESS) -> Link:
        """Attach behind what is on the hook already. The interface is of the calling thread's network namespace."""
        what = f"attach {program.name} to interface {ifindex}"
        return cls(_check(_lib().bpf_link_create(program.fd, ifindex, hook, None), what))

    @property
    def ifindex(self) -> int:
        """Where it is attached; 0 when the interface is gone."""
        return int(self._look().ifindex)

    @property
    def program(self) -> int:
        """Number of the program that runs there."""
        return int(self._look().prog_id)

    def update(self, program: Program) -> None:
        """Put another program in the old one's place: no packet passes between them."""
        _check(_lib().bpf_link_update(self.fd, program.fd, None), f"replace the program of a link by {program.name}")

    def detach(self) -> None:
        """Take the program off now; the kernel does so only some time after the last descriptor and pin are gone."""
        _check(_lib().bpf_link_detach(self.fd), "detach a link")

    def close(self) -> None:
        """Give the descriptor back. The program stays attached while the link is pinned."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _look(self) -> _LinkInfo:
        info = _LinkInfo()
        _info(self.fd, info, "link")
        return info


@dataclass
class Shape:
    """A map as an object declares it: its type, and what C says an entry is."""

    name: str
    type: int
    internal: bool
    key: Dtype | None
    value: Dtype | None
    key_size: int
    value_size: int
    pointer: int = field(repr=False, default=0)


class Object:
    """An object file, opened: `shapes` are its maps. Then sized, given what is pinned already, and loaded."""

    def __init__(self, path: Path) -> None:
        """Raises LoadError if this is no BPF object that libbpf can read."""
        lib = _lib()
        self.path = path
        options = _OpenOptions(ctypes.sizeof(_OpenOptions), b"nestnet")
        with _listened() as said:
            opened = lib.bpf_object__open_file(os.fsencode(path), byref(options))
            if not opened:
                number = ctypes.get_errno()
                raise LoadError(f"{path} is no BPF object: {os.strerror(number)}{_tail(said)}", "".join(said))
        self._object: int | None = opened
        self.btf = self._btf()
        self.shapes = {shape.name: shape for shape in self._shapes()}

    def close(self) -> None:
        """Give everything back that is not pinned, attached or owned by others."""
        if self._object is not None:
            _lib().bpf_object__close(self._object)
            self._object = None

    def _btf(self) -> Btf:
        found = _lib().bpf_object__btf(self._object)
        if not found:
            raise LoadError(f"{self.path} has no BTF: compile it with -g")
        size = c_uint32()
        raw = _lib().btf__raw_data(found, byref(size))
        return Btf.parse(ctypes.string_at(raw, size.value))

    def _shapes(self) -> Iterator[Shape]:
        lib = _lib()
        at = lib.bpf_object__next_map(self._object, None)
        while at:
            key, value = lib.bpf_map__btf_key_type_id(at), lib.bpf_map__btf_value_type_id(at)
            internal = lib.bpf_map__is_internal(at)
            yield Shape(
                lib.bpf_map__name(at).decode(),
                lib.bpf_map__type(at),
                internal,
                self.btf.dtype(key) if key and not internal else None,
                self.btf.dtype(value) if value and not internal else None,
                lib.bpf_map__key_size(at),
                lib.bpf_map__value_size(at),
                at,
            )
            at = lib.bpf_object__next_map(self._object, at)

    # ---- before it is loaded

    def resize(self, name: str, entries: int) -> None:
        """How many entries a map is made for."""
        _check(_lib().bpf_map__set_max_entries(self.shapes[name].pointer, entries), f"size of map {name}")

    def reuse(self, name: str, existing: Map) -> None:
        """Use a map that exists, with its size and content, instead of a new one. LoadError if it is another kind."""
        shape = self.shapes[name]
        if (shape.type, shape.key_size, shape.value_size) != (
            existing.type,
            existing.key.itemsize if existing.type != RINGBUF else 0,
            existing.value.itemsize if existing.type != RINGBUF else 0,
        ):
            raise LoadError(f"map {name} is pinned with another layout under the same version: bring the machine down")
        _check(_lib().bpf_map__reuse_fd(shape.pointer, existing.fd), f"reuse map {name}")

    def constant(self, name: str, value: int) -> None:
        """Set a `const volatile` u32. LoadError if the object has none of that name."""
        at = self.btf.offset(".rodata", name)
        shape = next((s for s in self.shapes.values() if s.internal and s.name.endswith(".rodata")), None)
        if at is None or shape is None:
            raise LoadError(f"{self.path} has no constant {name}")
        size = c_size_t()
        start = _lib().bpf_map__initial_value(shape.pointer, byref(size))
        ctypes.memmove(start + at, c_uint32(value).value.to_bytes(4, "little"), 4)

    def load(self) -> None:
        """Make the maps, verify the programs. LoadError has the end of the verifier's log."""
        lib = _lib()
        for _, at in self._programs():
            # libbpf 1.1 does not know the section tcx/ingress, and leaves the type open.
            lib.bpf_program__set_type(at, SCHED_CLS)
        with _listened() as said:
            result = lib.bpf_object__load(self._object)
            if result < 0:
                number = ctypes.get_errno() or -result
                raise LoadError(f"{self.path} does not load: {os.strerror(number)}{_tail(said)}", "".join(said))

    # ---- afterwards

    def map_fds(self) -> Mapping[str, int]:
        """Descriptors of all maps, the caller's to close."""
        return {name: os.dup(_lib().bpf_map__fd(shape.pointer)) for name, shape in self.shapes.items()}

    def programs(self) -> dict[str, Program]:
        """All programs by name, the caller's to close."""
        return {name: Program(os.dup(_lib().bpf_program__fd(at))) for name, at in self._programs()}

    def _programs(self) -> Iterator[tuple[str, int]]:
        at = _lib().bpf_object__next_program(self._object, None)
        while at:
            yield _lib().bpf_program__name(at).decode(), at
            at = _lib().bpf_object__next_program(self._object, at)


class Ring:
    """The reading end of a ring buffer map."""

    def __init__(self, source: Map) -> None:
        self._records: list[bytes] = []
        # ctypes keeps no reference to a callback: without ours it would be freed under libbpf's feet.
        self._callback = _Sample(self._take)
        self._ring: int | None = _lib().ring_buffer__new(source.fd, self._callback, None, None)
        if not self._ring:
            _check(-1, f"read ring buffer {source.name}")

    def _take(self, _: int, data: int, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        return 0

    def fileno(self) -> int:
        """Becomes readable when there is a record."""
        return _check(_lib().ring_buffer__epoll_fd(self._ring), "wait for the ring buffer")

    def take(self) -> list[bytes]:
        """All records that are there, oldest first; they are gone then."""
        _check(_lib().ring_buffer__consume(self._ring), "read the ring buffer")
        taken, self._records = self._records, []
        return taken

    def close(self) -> None:
        """Unmap it."""
        if self._ring:
            _lib().ring_buffer__free(self._ring)
            self._ring = None


def on_hook_numbers(ifindex: int, hook: int = TCX_INGRESS) -> list[int]:
    """Numbers of the programs on a tcx hook of an interface, ours and others', in the order they run."""
    count, flags, numbers = c_uint32(64), c_uint32(), (c_uint32 * 64)()
    result = _lib().bpf_prog_query(ifindex, hook, 0, byref(flags), numbers, byref(count))
    if result < 0:
        _check(result, f"look at the hook of interface {ifindex}")
    return numbers[: count.value]


def on_hook(ifindex: int, hook: int = TCX_INGRESS) -> list[str]:
    """The names of the same."""
    names = []
    for number in on_hook_numbers(ifindex, hook):
        with contextlib.closing(Program.of_id(number)) as program:
            names.append(program.name)
    return names


def pin(fd: int, path: Path) -> None:
    """Pin a map, program or link where nothing is yet. bpffs keeps names with dots for itself."""
    _check(_lib().bpf_obj_pin(fd, os.fsencode(path)), f"pin {path}")


def get(path: Path) -> int:
    """A descriptor of what is pinned there. OSError ENOENT if nothing is."""
    return _check(_lib().bpf_obj_get(os.fsencode(path)), str(path))


def _info(fd: int, into: ctypes.Structure, what: str) -> None:
    size = c_uint32(ctypes.sizeof(into))
    _check(_lib().bpf_obj_get_info_by_fd(fd, byref(into), byref(size)), f"look at a {what}")


def _tail(said: list[str]) -> str:
    lines = "".join(said).rstrip().splitlines()
    cut = [f"... {len(lines) - LOG_LINES} lines more ..."] if len(lines) > LOG_LINES else []
    return "".join(f"\n  {line}" for line in [*cut, *lines[-LOG_LINES:]])
