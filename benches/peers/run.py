#!/usr/bin/env python3
"""Runs overspill and its rivals in turn, under the same limits, and writes a report. See README.md."""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import limits
import report
from cases import CASES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGES = {
    "llama.cpp": ["llama-cpp-python"],
    "torch": ["torch", "transformers", "accelerate", "airllm"],
}
# Ceilings around a pair that differ by more make it worthless.
CEILINGS_APART_MAX = 1.10
# Of a plain disk's ceiling, seconds; a throttled one is exact.
CEILING_S, CEILING_THROTTLED_S = 10, 2


def main():
    options = arguments()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, work)
    cases = [case for case in CASES if not options.cases or case.name in options.cases]
    unknown = set(options.cases) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CASES)}")
    for case in cases:
        wires = [None]
        if case.disk:
            wires = [wire for wire, left_out in ((options.throttle, options.only_plain), (None, options.only_throttled))
                     if not left_out]
        for wire in wires:
            bench.pairs(case, wire)
    report.write(options.out, bench.log_path)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("peers-work"), help="models, rivals' environments (30 GB)")
    parser.add_argument("--out", type=Path, default=Path("peers-report"), help="report.md, report.html, runs.jsonl")
    parser.add_argument("--cases", nargs="*", default=[], help="only these rows")
    parser.add_argument("--pairs", type=int, default=5, help="valid pairs of runs for each row")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--throttle", type=int, default=500_000_000, help="bytes per second of the throttled disk")
    parser.add_argument("--only-throttled", action="store_true", help="leave out the disk as it is")
    parser.add_argument("--only-plain", action="store_true", help="leave out the throttled disk")
    parser.add_argument("--overspill", type=Path, help="the program, if it is not to be built")
    parser.add_argument("--venv", action="append", default=[], metavar="NAME=DIRECTORY",
                        help="an environment that has the rival already: llama.cpp or torch")
    return parser.parse_args()


class Bench:
    def __init__(self, options, work):
        self.options, self.work = options, work
        options.out.mkdir(parents=True, exist_ok=True)
        self.log_path = options.out / "runs.jsonl"
        self.venvs = dict(item.split("=", 1) for item in options.venv)
        self.device = limits.block_device(work)
        self.program = options.overspill or self.build()

    def build(self):
        subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=ROOT, check=True)
        target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
        return target / "release" / "overspill"

    def python(self, kind):
        """The interpreter of a rival's environment, made if it is not there."""
        directory = Path(self.venvs.get(kind, self.work / f"venv-{kind}"))
        python = directory / "bin" / "python"
        if not python.exists():
            print(f"setting up {', '.join(PACKAGES[kind])} (minutes)", flush=True)
            subprocess.run([sys.executable, "-m", "venv", directory], check=True)
            # llama.cpp for this processor, as its users would build it.
            environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
            subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[kind]], env=environment, check=True)
        return python

    def model(self, model):
        path = self.work / model.file
        if not path.exists():
            partial = path.with_name("partial-" + path.name)
            shutil.rmtree(partial, ignore_errors=True)
            subprocess.run([self.program, "synth", "--preset", model.preset, "--dtype", model.dtype, "--format",
                            model.format, "--force", "-o", partial], check=True)
            partial.rename(path)
        return path

    def pairs(self, case, wire):
        """Runs pairs of one row until enough are valid."""
        path = self.model(case.model)
        weights = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in weights)
        limit = int(size * case.share) if case.share else None
        valid, pair = 0, 0
        rival = self.rival(case, path)
        while valid < self.options.pairs and pair < 3 * self.options.pairs:
            order = [("overspill", self.own(case, path)), (case.rival, rival)]
            if pair % 2:
                order.reverse()
            rates, runs = [self.ceiling(weights, wire, case)], {}
            for name, command in order:
                runs[name] = self.one(case, command, name, limit, wire, [path, *self.offload(case)])
                rates.append(self.ceiling(weights, wire, case))
                runs[name]["ceiling"] = (rates[-1] + rates[-2]) / 2 if rates[-1] else None
            good = [rate for rate in rates if rate]
            sound = not good or max(good) <= CEILINGS_APART_MAX * min(good)
            valid += sound
            pair += 1
            line = {"case": case.name, "wire": wire, "limit_bytes": limit, "model_bytes": size, "valid": sound,
                    "ceilings": rates, "rival": case.rival, "runs": runs, "time": time.time()}
            with open(self.log_path, "a") as log:
                log.write(json.dumps(line) + "\n")
            print(report.line(case, line), flush=True)

    def ceiling(self, weights, wire, case):
        if not case.disk:
            return None
        group = limits.Group(None, self.device, wire)
        try:
            return limits.ceiling(max(weights, key=os.path.getsize), CEILING_THROTTLED_S if wire else CEILING_S, group)
        finally:
            group.close()

    def own(self, case, path):
        if case.figure == "prefill":
            # In its second time, as the rival's: what fits is in memory.
            return [self.program, "bench", path, "--device", "cpu", "--prompt-tokens", str(case.prompt), "-n", "2", "-r", "1",
                    "--rehearse", "--probe-seconds", "0.1", "--threads", str(self.options.threads), "-o", "json"], {}
        prompt = ",".join(str(300 + index * 7) for index in range(case.prompt))
        # In RAM what is compared is the state of a program that has run for a while: the page cache that the rival maps
        # lies in huge pages from before it started.
        pages = [] if case.share else ["--huge-pages", "always"]
        return [self.program, "run", path, "--device", "cpu", "--prompt-ids", prompt, "--max-new-tokens",
                str(case.new + 1), "--threads", str(self.options.threads), "--activations", "q8", *pages, "--json"], {}

    def rival(self, case, path):
        threads = str(self.options.threads)
        if case.rival == "llama.cpp":
            # Repacked weights are a second copy in memory that cannot be evicted: a limited run is killed with them.
            repack = "0" if case.share else "1"
            warm = "1" if case.figure == "prefill" or not case.share else "0"
            command = [self.python("llama.cpp"), HERE / "rivals" / "llama_cpp_peer.py", path, repack, threads,
                       str(case.prompt), str(case.new), warm]
        else:
            offload = self.work / f"offload-{case.rival}-{path.name}"
            command = [self.python("torch"), HERE / "rivals" / "torch_peer.py", case.rival, path, offload, threads,
                       str(case.prompt), str(case.new)]
        return command, {"PEERS_GROUPS": None}

    def offload(self, case):
        directory = self.work / f"offload-{case.rival}-{case.model.file}"
        return [directory] if directory.exists() else []

    def one(self, case, command, name, limit, wire, cached):
        """One program, once, under the limits and with a cold cache; its own figures, and what the system says."""
        command, environment = command
        group = limits.Group(limit, self.device, wire)
        try:
            if limit:
                limits.drop_cache(cached)
            else:
                # In RAM: everything is in the page cache before.
                for path in cached:
                    for file in [path] if path.is_file() else path.rglob("*"):
                        if file.is_file():
                            with open(file, "rb", buffering=0) as handle:
                                while handle.read(16 << 20):
                                    pass
            own = "PEERS_GROUPS" not in environment
            variables = os.environ | {"PEERS_GROUPS": "" if own else ":".join(group.members())}
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([str(part) for part in command], env=variables, capture_output=True, text=True,
                                  preexec_fn=(lambda: limits.join(group.members())) if own else None)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            lines = done.stdout.strip().splitlines()
            if done.returncode or not lines:
                raise SystemExit(f"{name} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
            figures = json.loads(lines[-1])
            if own:
                figures = from_bench(figures) if case.figure == "prefill" else from_run(figures)
            return figures | {"cpu_s": cpu, "peak_bytes": group.peak_bytes()}
        finally:
            group.close()


def from_bench(told):
    """The same from `overspill bench -o json`, of one configuration run once."""
    figures = told["rows"][0]["figures"]
    host = next(tier for tier in figures["tiers"] if tier["label"] == "host")
    return {
        "first_token_s": figures["open_s"] + figures["first_token_s"],
        "prefill_tokens_per_s": figures["prompt_tokens"] / figures["prefill_s"],
        "decode_s_per_token": figures["decode_s"] / max(figures["decoded_tokens"], 1),
        "read_bytes_per_token": figures["decode_read_bytes"] / max(figures["decoded_tokens"], 1),
        "touched_bytes": None,
        "budget_bytes": host["budget_bytes"],
        "in_flight_bytes": figures["in_flight_bytes"],
    }


def from_run(told):
    """The fields that a rival's program tells, from `overspill run --json`."""
    tokens = max(len(told["tokens"]) - 1, 1)
    host = told["tiers"]["host"]
    return {
        "first_token_s": told["time_s"]["open"] + told["time_s"]["first_token"],
        "prefill_tokens_per_s": told["tokens_per_s"]["prefill"],
        "decode_s_per_token": told["time_s"]["decode"] / tokens,
        "read_bytes_per_token": told["decode_read_bytes"] / tokens,
        "touched_bytes": told["touched_bytes_per_token"],
        "budget_bytes": host["budget_bytes"],
        "in_flight_bytes": told["in_flight_bytes"],
        "resident_bytes": told.get("peak_resident_bytes"),
        "limit": told["limit"],
        "evict": told["evict"],
        "io": told["io"],
    }


if __name__ == "__main__":
    main()
