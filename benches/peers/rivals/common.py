"""What each rival's program tells of itself, so that all tell the same: one line of JSON."""

import json
import os
import resource
import time

PROMPT = [300 + index * 7 for index in range(512)]


def join_groups():
    """Enters the control groups, called after the imports: what the interpreter and its libraries hold is not counted."""
    for member in filter(None, os.environ.get("PEERS_GROUPS", "").split(":")):
        with open(member, "w") as file:
            file.write(str(os.getpid()))


def read_bytes():
    """Bytes that this process has had read from disk."""
    with open("/proc/self/io") as file:
        for line in file:
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(load, prefill, decode, prompt_tokens, new_tokens, warm_up):
    """Loads, takes in a prompt, decodes token by token; prints the figures.

    `prefill(tokens)` starts a new text and returns when its logits are there; `decode()` adds a token. With `warm_up`
    the prompt is taken in twice, and the second time counts.
    """
    begin = time.perf_counter()
    load()
    loaded = time.perf_counter() - begin
    if warm_up:
        prefill(PROMPT[:prompt_tokens])
    start = time.perf_counter()
    prefill(PROMPT[:prompt_tokens])
    took = time.perf_counter() - start
    first = time.perf_counter() - begin
    tokens, cpu, read = [], cpu_seconds(), read_bytes()
    for _ in range(new_tokens):
        start = time.perf_counter()
        decode()
        tokens.append(time.perf_counter() - start)
    count = max(new_tokens, 1)
    print(json.dumps({
        "load_s": loaded,
        "first_token_s": first,
        "prefill_tokens_per_s": prompt_tokens / took,
        "decode_s_per_token": sum(tokens) / count,
        "token_s": tokens,
        "read_bytes_per_token": (read_bytes() - read) / count,
        "cpu_s_per_token": (cpu_seconds() - cpu) / count,
    }), flush=True)
