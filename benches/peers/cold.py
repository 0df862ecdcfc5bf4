#!/usr/bin/env python3
"""Cold start: from the program's start to its first token, against the slower of disk and fresh memory. See README.md."""

import argparse
import json
import mmap
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import limits

PROMPT = "300,307,314,321,328,335,342,349"
# Asked: no more than this times the bound, and so much beside it.
FACTOR, SECONDS = 1.15, 0.2


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+", help=".gguf files")
    parser.add_argument("--overspill", type=Path, required=True, help="the program")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--throttle", type=int, action="append", default=[], help="bytes per second; 0: as it is")
    parser.add_argument("--ceiling-seconds", type=float, default=3)
    options = parser.parse_args()
    print("| model | disk | first token | disk's share | first touch | asked | of the bound | runs | met |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in options.models:
        for bytes_per_s in options.throttle or [0]:
            row(options, model, bytes_per_s)


def row(options, model, bytes_per_s):
    size = model.stat().st_size
    runs = [one(options, model, size, bytes_per_s) for _ in range(options.runs)]
    for run in runs:
        print(json.dumps({"model": model.name, "throttle": bytes_per_s} | run), file=sys.stderr)
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    bound = max(middle["disk_s"], middle["touch_s"])
    asked = FACTOR * bound + SECONDS
    disk = f"{bytes_per_s / 1e6:.0f} MB/s" if bytes_per_s else "as it is"
    print(f"| {model.name} | {disk} | {middle['first_s']:.2f} s | {middle['disk_s']:.2f} s | {middle['touch_s']:.2f} s | "
          f"≤ {asked:.2f} s | {middle['first_s'] / bound:.2f} | {options.runs} | "
          f"{'yes' if middle['first_s'] <= asked else 'no'} |", flush=True)


def one(options, model, size, bytes_per_s):
    """One start, the disk measured before and after it, first touch after it."""
    group = limits.Group(None, limits.block_device(model), bytes_per_s)
    try:
        before = limits.ceiling(model, options.ceiling_seconds, group)
        limits.drop_cache([model])
        command = [options.overspill, "run", model, "--device", "cpu", "--prompt-ids", PROMPT, "-n", "1", "--json"]
        begin = time.perf_counter()
        # The group takes a moment to enter, which is not the program's.
        ran = subprocess.run(command, preexec_fn=lambda: limits.join(group.members()), capture_output=True, text=True,
                             check=True)
        wall = time.perf_counter() - begin
        found = json.loads(ran.stdout)["time_s"]
        after = limits.ceiling(model, options.ceiling_seconds, group)
    finally:
        group.close()
    touched = [size / first_touch(size, threads) for threads in (1, 2)]
    return {"first_s": found["open"] + found["first_token"], "wall_s": wall, "disk_s": size / ((before + after) / 2),
            "touch_s": size / max(touched), "touch_1_s": size / touched[0], "touch_2_s": size / touched[1]}


def first_touch(size, threads):
    """Seconds that it takes to write once to each page of fresh memory of this size, by so many threads."""
    memory = mmap.mmap(-1, size // mmap.PAGESIZE * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    share = len(memory) // threads // mmap.PAGESIZE * mmap.PAGESIZE

    def work(index):
        # MADV_POPULATE_WRITE: the kernel's own loop over the pages, without the interpreter's.
        memory.madvise(23, index * share, share)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    taken = time.perf_counter() - begin
    memory.close()
    return taken


if __name__ == "__main__":
    main()
