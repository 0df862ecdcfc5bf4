#!/usr/bin/env python3
"""Plans configurations, runs them, and says how far the plans were off. See README.md."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent / "peers"))
import limits  # noqa: E402  (the control groups are those of the comparison with rivals)

SHAPES = {
    "dense": {
        "model_type": "llama", "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16,
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    },
    "mixture": {
        "model_type": "qwen3_moe", "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 896,
        "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "vocab_size": 32000, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
}
DTYPES = ("f16", "q8_0", "q4_0")
BUDGETS = (25, 50, 75, 100)
PROMPT = 64
# Prompts before the one that counts. Plans are for memories that have seen every expert; one prompt shows them few.
REHEARSALS = {"dense": 1, "mixture": 8}
# Profiles taken before and after a run, whose disks differ by more, make it worthless.
APART_MAX = 1.10
TRIES = 4
# The kernel's throttle counts bytes in slices of so long: what a pause leaves of a slice is made good for.
BURST_US = 100_000


@dataclass(frozen=True)
class Case:
    shape: str
    dtype: str
    budget: int

    @property
    def name(self):
        return f"{self.shape}-{self.dtype}-{self.budget}"

    def new(self, wire):
        """Tokens to generate: a dense model's passes are alike, and take seconds where the disk is throttled; a mixture's
        differ, and its memory needs time to settle."""
        if self.shape == "mixture":
            return 129 if self.budget == 25 else 257
        return 9 if wire is not None and self.budget < 100 else 33

    def rounds(self, wire):
        """How often it is run, with the machine measured before, between and after. What a throttled disk binds for many
        seconds needs no more than one."""
        long = self.budget == 25 if self.shape == "mixture" else self.dtype == "f16" and self.budget < 100
        return 1 if wire is not None and long else 3


CASES = [Case(shape, dtype, budget) for shape in SHAPES for dtype in DTYPES for budget in BUDGETS]


def main():
    options = arguments()
    unknown = set(options.cases) - {case.name for case in CASES}
    if unknown:
        raise SystemExit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in CASES)}")
    bench = Bench(options)
    wires = [options.throttle] * (not options.only_plain) + [None] * (not options.only_throttled)
    begin = time.monotonic()
    for wire in wires:
        for case in CASES:
            if options.cases and case.name not in options.cases or bench.done(case, wire) or options.report_only:
                continue
            if options.seconds_max and time.monotonic() - begin > options.seconds_max:
                print("time is over: the same command goes on where this ended")
                report(options, bench.lines())
                return
            bench.measure(case, wire)
    report(options, bench.lines())


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("planned-work"), help="where models are made (6 GB)")
    parser.add_argument("--out", type=Path, default=Path("planned-report"), help="report.md, runs.jsonl")
    parser.add_argument("--cases", nargs="*", default=[], help="only these")
    parser.add_argument("--throttle", type=int, default=500_000_000, help="bytes per second of the throttled disk")
    parser.add_argument("--only-throttled", action="store_true", help="leave out the disk as it is")
    parser.add_argument("--only-plain", action="store_true", help="leave out the throttled disk")
    parser.add_argument("--seconds-max", type=float, help="begin nothing after so many seconds; run again to go on")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--overspill", type=Path, help="the program, if it is not to be built")
    return parser.parse_args()


class Bench:
    def __init__(self, options):
        self.work, self.log = options.work.resolve(), options.out / "runs.jsonl"
        self.work.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)
        self.program = str((options.overspill or self.build()).resolve())
        self.device = limits.block_device(self.work)
        self.group = None

    def build(self):
        subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=ROOT, check=True)
        return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "overspill"

    def lines(self):
        return [json.loads(text) for text in self.log.read_text().splitlines()] if self.log.exists() else []

    def done(self, case, wire):
        of_this = [line for line in self.lines() if (line["case"], line["wire"]) == (case.name, wire)]
        return any(line["valid"] for line in of_this) or len(of_this) >= TRIES

    def ask(self, *words, group=None):
        members = group.members() if group else []
        command = [self.program, *map(str, words)]
        answer = subprocess.run(command, preexec_fn=lambda: limits.join(members), capture_output=True, text=True)
        if answer.returncode:
            raise SystemExit(f"{' '.join(command)}\n{answer.stderr}")
        return answer.stdout

    def model(self, case):
        path = self.work / f"{case.shape}-{case.dtype}.gguf"
        if not path.exists():
            config = self.work / f"{case.shape}.json"
            config.write_text(json.dumps(SHAPES[case.shape]))
            self.ask("synth", "--config", config, "--dtype", case.dtype, "--format", "gguf", "-o", path)
        return path

    def routing(self, case, model, new):
        """How this model's routers choose on the benchmark's prompt: the same on every budget, as the answers are."""
        if case.shape == "dense":
            return "uniform"
        path = self.work / f"{case.shape}-{case.dtype}-{new}.csv"
        if not path.exists():
            ids = ",".join(map(str, prompt(PROMPT, SHAPES[case.shape]["vocab_size"])))
            self.ask("run", model, "--device", "cpu", "--prompt-ids", ids, "-n", new,
                     "--record-routing", path, "--json")
        return path

    def profile(self, model, name, group, wire):
        """This machine as the planner measures it: in the group, so that the disk is the throttled one."""
        path = self.work / f"{name}.toml"
        text = self.ask("plan", model, "--show-hardware", "this", "--chunk", PROMPT, group=group)
        if wire is not None:
            text += f"burst_us = {BURST_US}\n"
        path.write_text(text)
        return path

    def plan(self, case, model, routing, profile, new):
        answer = self.ask("plan", model, "--hardware", profile, "--device", "cpu", "--ram", f"{case.budget}%",
                          "--ctx", PROMPT + new, "--chunk", PROMPT, "--routing", routing, "--json")
        plan = json.loads(answer)
        keys = ("tokens_per_s", "bound_by", "disk_bytes", "hit_rate", "compute_s", "stall_s", "first_pass_s")
        return {phase: {key: plan[phase][key] for key in keys} for phase in ("decode", "prefill")}

    def run(self, case, model, group, new):
        answer = self.ask("bench", model, "--device", "cpu", "--ram", f"{case.budget}%", "--prompt-tokens", PROMPT,
                          "-n", new, "-r", 1, "-o", "json", "--probe-seconds", 0.1, f"--rehearse={REHEARSALS[case.shape]}", group=group)
        found = json.loads(answer)
        row = found["rows"][0]
        if row["failed"]:
            raise SystemExit(f"{case.name}: {row['failed']}")
        return {
            "decode_tokens_per_s": row["decode"]["median"], "prefill_tokens_per_s": row["prefill"]["median"],
            "read_bytes_per_token": row["read_bytes_per_token"], "hit_share": row["hit_share"],
            "compute_s": row["compute_s"], "stall_s": row["stall_s"],
        }

    def measure(self, case, wire):
        model = self.model(case)
        new = case.new(wire)
        routing = self.routing(case, model, new)
        limits.drop_cache([model])
        group = limits.Group(None, self.device, wire)
        try:
            profiles, runs = [self.profile(model, "profile-0", group, wire)], []
            for number in range(1, case.rounds(wire) + 1):
                runs.append(self.run(case, model, group, new))
                profiles.append(self.profile(model, f"profile-{number}", group, wire))
        finally:
            group.close()
        rates = [rates_of(path) for path in profiles]
        plans = [self.plan(case, model, routing, path, new) for path in profiles]
        for number, run in enumerate(runs):
            disks = [rate["disk"] for rate in rates[number : number + 2]]
            run["valid"] = max(disks) <= APART_MAX * min(disks)
        line = {
            "case": case.name, "wire": wire, "new": new, "valid": any(run["valid"] for run in runs),
            "profiles": rates, "plans": plans, "runs": runs,
            "at": time.strftime("%Y-%m-%d %H:%M"),
        }
        with self.log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        for phase in ("decode", "prefill"):
            planned, measured = pair(line, phase)
            print(f"{case.name:18} {wire_name(wire):12} {phase:8} planned {planned:8.2f} measured {measured:8.2f} "
                  f"{planned / measured - 1:+.1%}{'' if line['valid'] else ' (not valid: the disk changed)'}", flush=True)


def prompt(tokens, vocabulary):
    """The prompt of `overspill bench`."""
    state, ids = 0x9E3779B97F4A7C15, []
    for _ in range(tokens):
        state ^= state << 13 & (1 << 64) - 1
        state ^= state >> 7
        state ^= state << 17 & (1 << 64) - 1
        ids.append(state % vocabulary)
    return ids


def rates_of(profile):
    """The figures of a profile."""
    values, section = {}, ""
    for text in profile.read_text().splitlines():
        if text.startswith("["):
            section = text.strip("[]")
        elif " = " in text:
            key, value = text.split(" = ", 1)
            values[f"{section}.{key}"] = value
    return {
        "disk": float(values["disk.gb_per_s"]), "memory": float(values["host.memory_gb_per_s"]),
        "tflops": float(values["host.tflops"]),
    }


def wire_name(wire):
    return "disk as it is" if wire is None else f"{wire / 1e6:.0f} MB/s"


def pair(line, phase):
    """Tokens per second: planned (the mean of what the profiles before and after a run give), and measured; medians of
    the runs that are not thrown away."""
    of_phase = lambda plan: plan[phase]["tokens_per_s"]  # noqa: E731
    pairs = [
        (statistics.harmonic_mean([of_phase(plan) for plan in line["plans"][number : number + 2]]),
         run[f"{phase}_tokens_per_s"])
        for number, run in enumerate(line["runs"]) if run["valid"] or not line["valid"]
    ]
    return tuple(statistics.median(column) for column in zip(*pairs))


def report(options, lines):
    cases = {case.name: number for number, case in enumerate(CASES)}
    text = ["# Planned against measured", ""]
    for wire in sorted({line["wire"] for line in lines}, key=lambda wire: wire is None):
        of_wire = [line for line in lines if line["wire"] == wire]
        valid = {line["case"]: line for line in of_wire if line["valid"]}
        valid = sorted(valid.values(), key=lambda line: cases.get(line["case"], len(cases)))
        text += [f"## {wire_name(wire)}", ""]
        errors = {phase: [abs(a / b - 1) for a, b in (pair(line, phase) for line in valid)]
                  for phase in ("decode", "prefill")}
        both = errors["decode"] + errors["prefill"]
        for name, values in (("decode", errors["decode"]), ("prefill", errors["prefill"]), ("both", both)):
            if values:
                text.append(f"- {name}: {len(values)} figures, median error {statistics.median(values):.1%}, "
                            f"worst {max(values):.1%}")
        runs = [run for line in of_wire for run in line["runs"]]
        thrown = sum(not run["valid"] for run in runs)
        text += [f"- {thrown} of {len(runs)} runs thrown away since the disk's speed before and after differed by more than "
                 f"{APART_MAX - 1:.0%}", ""]
        text += ["| configuration | disk GB/s | memory GB/s | TFLOP/s | decode planned | measured | error | binds "
                 "| prompt planned | measured | error | binds |",
                 "| --- |" + " ---: |" * 6 + " --- |" + " ---: |" * 3 + " --- |"]
        for line in valid:
            range_of = lambda key, digits: " – ".join(  # noqa: E731
                f"{end(rate[key] for rate in line['profiles']):.{digits}f}" for end in (min, max))
            cells = [line["case"] + " %", range_of("disk", 3), range_of("memory", 1), range_of("tflops", 3)]
            for phase in ("decode", "prefill"):
                planned, measured = pair(line, phase)
                cells += [f"{planned:.2f}", f"{measured:.2f}", f"{planned / measured - 1:+.1%}",
                          line["plans"][0][phase]["bound_by"]]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    (options.out / "report.md").write_text("\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
