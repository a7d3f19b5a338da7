"""Network namespaces, made so that `ip netns` sees them.

A namespace with a name is a bind mount of `/proc/PID/ns/net` on `/run/netns/NAME`, as iproute2 makes them; it
lives until the mount is gone and nothing runs in it. A thread enters one with setns(2) (`os.setns` is Python
3.12), so work that has to happen inside runs on a thread of its own: sockets that it opens and processes that
it starts stay in that namespace, and the caller never leaves his. Nothing else changes: unlike under
`ip netns exec`, /sys/fs/bpf stays visible.

Look from a shell with `ip netns list` and `ip netns pids NAME`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

FOLDER = Path("/run/netns")

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
MS_BIND, MS_REC, MS_SHARED, MNT_DETACH = 0x1000, 0x4000, 1 << 20, 2  # <linux/mount.h>

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p)

T = TypeVar("T")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def path(name: str) -> Path:
    """Where the namespace of this name is mounted, whether it exists or not."""
    return FOLDER / name


def enter(namespace: Path) -> None:
    """Move the calling *thread* into a namespace, for good. Raises OSError when there is none."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, CLONE_NEWNET), str(namespace))
    finally:
        os.close(fd)


def _on_a_thread(work: Callable[[], T], name: str) -> T:
    """Run `work` on a thread of its own, and hand back what it returns or raises."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return done[0]


def run_in(namespace: Path, work: Callable[[], T]) -> T:
    """What `work()` returns when it runs inside a namespace; what it raises is raised here."""

    def inside() -> T:
        enter(namespace)
        return work()

    return _on_a_thread(inside, f"in {namespace.name}")


def spawn(
    namespace: Path,
    command: Sequence[str],
    *,
    output: BinaryIO | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process inside a namespace, in a session of its own, with nothing on stdin."""
    return run_in(
        namespace,
        lambda: subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            env=None if environment is None else dict(environment),
        ),
    )


@contextmanager
def _locked() -> Iterator[None]:
    """Two processes that make the first namespace at once must not both set up the folder."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _share_folder() -> None:
    """Make the folder a shared mount, as iproute2 does: then a namespace deleted anywhere is deleted everywhere."""
    folder = os.fsencode(FOLDER)
    if _libc.mount(b"", folder, b"none", MS_SHARED | MS_REC, None) == 0:
        return
    if ctypes.get_errno() != errno.EINVAL:  # EINVAL: not a mount point yet
        _check(-1, str(FOLDER))
    _check(_libc.mount(folder, folder, b"none", MS_BIND | MS_REC, None), str(FOLDER))
    _check(_libc.mount(b"", folder, b"none", MS_SHARED | MS_REC, None), str(FOLDER))


def create(name: str) -> Path:
    """Make a namespace and bring its loopback up. Raises FileExistsError when there is one of this name."""
    target = path(name)
    with _locked():
        _share_folder()
        os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))

    def make() -> None:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        source = os.fsencode(f"/proc/self/task/{threading.get_native_id()}/ns/net")
        _check(_libc.mount(source, os.fsencode(target), b"none", MS_BIND, None), str(target))

    try:
        _on_a_thread(make, f"make {name}")
    except BaseException:
        target.unlink()
        raise
    return target


def delete(name: str) -> bool:
    """Take a namespace's name away: it is gone once nothing runs in it. False when there was none."""
    target = path(name)
    # A crash between open and mount in `create` leaves a file without a mount: EINVAL.
    if _libc.umount2(os.fsencode(target), MNT_DETACH) < 0 and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
        _check(-1, str(target))
    try:
        target.unlink()
    except FileNotFoundError:
        return False
    return True


def names(prefix: str = "") -> list[str]:
    """The names of all namespaces that begin like this, sorted."""
    try:
        return sorted(entry.name for entry in FOLDER.iterdir() if entry.name.startswith(prefix))
    except FileNotFoundError:
        return []


def exists(name: str) -> bool:
    """Is there a namespace, not only a file, of this name?"""
    try:
        return path(name).stat().st_dev != FOLDER.stat().st_dev
    except FileNotFoundError:
        return False


@contextmanager
def held(name: str) -> Iterator[None]:
    """Keep a namespace from others who hold it too: the agents of a lab share its workloads' namespaces.

    Raises FileNotFoundError when there is none, or it went while we waited."""
    descriptor = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_ino != path(name).stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, "another namespace has its name now", str(path(name)))
        yield
    finally:
        os.close(descriptor)


def inode(namespace: Path) -> int:
    """What tells one namespace from all others: the number in `readlink /proc/PID/ns/net`."""
    return namespace.stat().st_ino


def processes(inodes: set[int]) -> list[int]:
    """The processes that have a thread in one of these namespaces (inode numbers), by rising pid."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return sorted(pid for pid in pids if not inodes.isdisjoint(_namespaces_of(pid)))


def visitors(inodes: set[int]) -> frozenset[int]:
    """Those of the processes that only have a thread in there, as who uses `run_in`: their own place is elsewhere."""

    def at_home(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/ns/net").stat().st_ino in inodes
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return True

    return frozenset(pid for pid in processes(inodes) if not at_home(pid))


def _namespaces_of(pid: int) -> set[int]:
    """The namespaces that the threads of a process are in; none when it is gone, or a zombie."""
    found = set()
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found.add((task / "ns/net").stat().st_ino)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return found


def kill_inside(
    namespaces: Sequence[Path], grace: float = 1.0, spare: frozenset[int] = frozenset(), visiting: bool = True
) -> list[int]:
    """End every process inside the namespaces: SIGTERM, SIGKILL after `grace` seconds, and again until none is left.

    Returns the pids it had to signal; never touches this process or those in `spare`, and without `visiting` none
    that has only a thread in there.
    """
    spared = spare | {os.getpid()}
    inodes = {inode(namespace) for namespace in namespaces if namespace.exists()}
    signalled: set[int] = set()
    end = time.monotonic() + grace
    while inodes:
        leave = spared if visiting else spared | visitors(inodes)
        if not (alive := [pid for pid in processes(inodes) if pid not in leave]):
            break
        late = time.monotonic() > end
        for pid in alive:
            if late or pid not in signalled:
                try:
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                except ProcessLookupError:
                    continue
                signalled.add(pid)
        if time.monotonic() > end + 5:
            break
        _wait_for_exit(alive, 0.05)
    return sorted(signalled)


def _wait_for_exit(pids: Sequence[int], seconds: float) -> None:
    """Wait until one of these processes ends, at most so long."""
    poll = select.poll()
    descriptors = []
    for pid in pids[:256]:
        try:
            descriptors.append(os.pidfd_open(pid))
        except OSError:
            continue
        poll.register(descriptors[-1], select.POLLIN)
    try:
        if descriptors:
            poll.poll(int(seconds * 1000))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
