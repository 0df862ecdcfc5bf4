"""What every program is held to alike: a control group with so much memory, a disk of such a speed, a cold cache.

Control groups of both versions are known; the first has been used, the second follows its documentation. Root is needed.
"""

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

NAME = "overspill-peers"


def block_device(path):
    """'major:minor' of the whole disk under a file."""
    number = os.stat(path).st_dev
    major, minor = os.major(number), os.minor(number)
    node = Path(f"/sys/dev/block/{major}:{minor}").resolve()
    if (node / "partition").exists():
        return (node.parent / "dev").read_text().strip()
    if not node.exists():
        raise SystemExit(f"{path}: its filesystem lies on no block device ({major}:{minor}); choose another --work")
    return f"{major}:{minor}"


class Group:
    """A control group: memory, the disk's read bandwidth, and a large share of the processors."""

    def __init__(self, memory_bytes, device, bytes_per_s):
        self.two = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        root = Path("/sys/fs/cgroup")
        try:
            if self.two:
                (root / "cgroup.subtree_control").write_text("+memory +io +cpu")
                self.parts = [root / NAME]
            else:
                self.parts = [root / kind / NAME for kind in ("memory", "blkio", "cpu")]
            for part in self.parts:
                part.mkdir(exist_ok=True)
            self._set(memory_bytes, device, bytes_per_s)
        except OSError as error:
            raise SystemExit(f"control groups cannot be made here: {error}; run as root, outside of a container") from error
        self.memory = self.parts[0]

    def _set(self, memory_bytes, device, bytes_per_s):
        if self.two:
            group = self.parts[0]
            (group / "memory.max").write_text(str(memory_bytes or "max"))
            (group / "memory.swap.max").write_text("0")
            (group / "io.max").write_text(f"{device} rbps={bytes_per_s or 'max'}")
            (group / "cpu.weight").write_text("10000")
            return
        memory, blkio, cpu = self.parts
        (memory / "memory.force_empty").write_text("0")
        (memory / "memory.limit_in_bytes").write_text(str(memory_bytes or -1))
        (memory / "memory.max_usage_in_bytes").write_text("0")
        (blkio / "blkio.throttle.read_bps_device").write_text(f"{device} {bytes_per_s or 0}")
        (cpu / "cpu.shares").write_text("40000")

    def members(self):
        """The files that a process writes its number to, in order to be in the group."""
        return [str(part / "cgroup.procs") for part in self.parts]

    def peak_bytes(self):
        name = "memory.peak" if self.two else "memory.max_usage_in_bytes"
        try:
            return int((self.memory / name).read_text())
        except OSError:
            return None

    def close(self):
        for part in self.parts:
            for _ in range(100):
                try:
                    part.rmdir()
                    break
                except OSError:
                    time.sleep(0.05)


def join(members):
    for member in members:
        Path(member).write_text(str(os.getpid()))


def drop_cache(paths):
    """Takes these files out of the page cache, and nothing else."""
    for path in paths:
        for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# Large requests, since each costs the interpreter some time: 1 MiB × 32 shows a quarter less than a fast disk has.
REQUEST = 4 << 20
DEPTH = 8
HUGE = 2 << 20
# Each thread reads into so many places, one after the other: all of them are more than processors' caches hold, as
# weights are. A virtual disk is up to a tenth faster into the same few places again and again.
PLACES = 8


def huge_buffers():
    """PLACES × REQUEST bytes in huge pages, where the system has them: into pages of 4 KiB a virtual disk may read at half
    its speed, since so many descriptors are more than its ring holds. Private memory: what is shared has none, as a rule."""
    memory = mmap.mmap(-1, PLACES * REQUEST + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE
    places = [memoryview(memory)[at : at + REQUEST] for at in range(skip, skip + PLACES * REQUEST, REQUEST)]
    for place in places:
        place[:: 4 << 10] = bytes(REQUEST >> 12)
    return places


def read_rate(path, seconds, settle=0.5):
    """Bytes per second of a file's ranges in order, past the page cache, 8 requests of 4 MiB in flight."""
    size = os.path.getsize(path) // REQUEST
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    lock, state = threading.Lock(), {"next": 0, "bytes": 0}
    buffers = [huge_buffers() for _ in range(DEPTH)]
    begin = time.perf_counter()
    # What a throttled disk has saved up is gone after a moment.
    start, end = begin + settle, begin + settle + seconds

    def work(buffers):
        while time.perf_counter() < end:
            with lock:
                index, state["next"] = state["next"] % size, state["next"] + 1
            got = os.preadv(descriptor, [buffers[index // DEPTH % PLACES]], index * REQUEST)
            if start <= time.perf_counter() < end:
                with lock:
                    state["bytes"] += got

    threads = [threading.Thread(target=work, args=[own]) for own in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(descriptor)
    return state["bytes"] / seconds


def ceiling(path, seconds, group):
    """The disk's speed now, under the group's throttle, measured in a process of its own."""
    command = [sys.executable, __file__, str(path), str(seconds)]
    # The group's memory is for the programs; this one needs 300 MiB.
    answer = subprocess.run(command, preexec_fn=lambda: join(group.members()), capture_output=True, text=True, check=True)
    return float(answer.stdout)


if __name__ == "__main__":
    print(read_rate(sys.argv[1], float(sys.argv[2])))
