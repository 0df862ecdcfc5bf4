"""Medians, intervals and physical ratios of the runs; a page of markdown and one of HTML."""

import html
import json
import math
import random
import statistics
from pathlib import Path

from cases import CASES


def seconds(case, run):
    """What is compared, in seconds: of a decoded token, or of a prompt's token."""
    return run["decode_s_per_token"] if case.figure == "decode" else 1 / run["prefill_tokens_per_s"]


def needed_bytes(run):
    """What overspill has to read for a token, given what it may keep: T − (B − R)."""
    return max(run["touched_bytes"] - (run["budget_bytes"] - run["in_flight_bytes"]), 0)


def ratios(case, line):
    """How many times faster overspill was; how many times it could be at the disk's speed; its distance from that."""
    own, rival = line["runs"]["overspill"], line["runs"][line["rival"]]
    ratio = seconds(case, rival) / seconds(case, own)
    physical = distance = None
    if case.figure == "decode" and own.get("ceiling") and own["touched_bytes"]:
        least = needed_bytes(own) / own["ceiling"]
        if least:
            physical = rival["read_bytes_per_token"] / rival["ceiling"] / least
            distance = own["decode_s_per_token"] / least
    return ratio, physical, distance


def line(case, line):
    """One pair, for the terminal."""
    own, rival = line["runs"]["overspill"], line["runs"][line["rival"]]
    ratio, physical, distance = ratios(case, line)
    text = (f"{case.name:22} {disk(line['wire']):10} overspill {seconds(case, own):.4f} s, {line['rival']} "
            f"{seconds(case, rival):.4f} s: {ratio:.2f}x")
    if physical:
        text += f" (physical {physical:.2f}x; {distance:.3f} of the limit)"
    return text + ("" if line["valid"] else "  thrown away: the disk's speed changed")


def disk(wire):
    return f"{wire / 1e6:.0f} MB/s" if wire else "as it is"


def interval(values):
    """The 95 % interval of the median, by bootstrap over the pairs."""
    dice = random.Random(1)
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def rows(lines):
    """A row for each case and wire: its medians."""
    for case in CASES:
        for wire in sorted({l["wire"] for l in lines if l["case"] == case.name}, key=lambda w: w or math.inf):
            mine = [l for l in lines if l["case"] == case.name and l["wire"] == wire]
            good = [l for l in mine if l["valid"]]
            if good:
                yield Row(case, wire, good, len(mine) - len(good))


class Row:
    def __init__(self, case, wire, good, thrown):
        self.case, self.wire, self.pairs, self.thrown = case, wire, len(good), thrown
        self.rival = case.rival
        own = [l["runs"]["overspill"] for l in good]
        rival = [l["runs"][case.rival] for l in good]
        median = statistics.median
        self.own_rate = median(1 / seconds(case, run) for run in own)
        self.rival_rate = median(1 / seconds(case, run) for run in rival)
        found = [ratios(case, l) for l in good]
        self.ratio = median(f[0] for f in found)
        self.low, self.high = interval([f[0] for f in found])
        physical = [f for f in found if f[1]]
        self.physical = median(f[1] for f in physical) if physical else None
        self.reached = median(f[0] / f[1] for f in physical) if physical else None
        self.distance = median(f[2] for f in physical) if physical else None
        self.read = median(run["read_bytes_per_token"] for run in own)
        self.rival_read = median(run["read_bytes_per_token"] for run in rival)
        self.bound = median(run["read_bytes_per_token"] / needed_bytes(run) for run in own) if physical else None
        ceilings = [run["ceiling"] for run in own if run.get("ceiling")]
        self.ceiling = median(ceilings) if ceilings else None
        self.limit = good[0]["limit_bytes"]
        self.peak = max(run["peak_bytes"] or 0 for run in own)
        self.overhead = median((run["peak_bytes"] or 0) - run["budget_bytes"] for run in own) if self.limit else None

    def met(self):
        """Whether what was asked for was reached; None where nothing was."""
        asks = []
        if self.case.ask is not None:
            # Equal means that the interval includes 1.
            asks.append(self.ratio >= self.case.ask or (self.case.ask == 1.0 and self.high >= 1.0))
        if self.case.ask_physical is not None and self.reached:
            asks.append(self.reached >= self.case.ask_physical)
        return all(asks) if asks else None


HEADINGS = ["case", "disk", "limit", "overspill", "rival", "ratio (95 %)", "asked", "physical", "reached", "of the limit",
            "read/token", "over T−(B−R)", "rival reads", "pairs", "met"]


def cells(row):
    show = lambda value, text: "–" if value is None else text.format(value)
    asked = [] if row.case.ask is None else [f"≥ {row.case.ask:g}"]
    if row.case.ask_physical is not None and row.physical:
        asked.append(f"≥ {row.case.ask_physical:g} × physical")
    unit = "tokens/s" + (" (prompt)" if row.case.figure == "prefill" else "")
    return [
        row.case.name,
        disk(row.wire) + ("" if row.wire or not row.ceiling else f" ({row.ceiling / 1e6:.0f} MB/s)"),
        show(row.limit and row.limit / 1e6, "{:.0f} MB"),
        f"{row.own_rate:.3g} {unit}",
        f"{row.rival} {row.rival_rate:.3g}",
        f"{row.ratio:.2f} ({row.low:.2f}–{row.high:.2f})",
        ", ".join(asked) or "–",
        show(row.physical, "{:.2f}"),
        show(row.reached and row.reached * 100, "{:.0f} %"),
        show(row.distance, "{:.3f}"),
        f"{row.read / 1e6:.0f} MB",
        show(row.bound, "{:.3f}"),
        f"{row.rival_read / 1e6:.0f} MB",
        f"{row.pairs}" + (f", {row.thrown} thrown away" if row.thrown else ""),
        {True: "yes", False: "no", None: "–"}[row.met()],
    ]


def markdown(found):
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in found]
    return "\n".join(lines) + "\n"


STYLE = """
:root { color-scheme: light dark; --own: #2a78d6; --rival: #8a8a84; --limit: #c2452d; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
td, th { padding: .3rem .6rem; border-bottom: 1px solid #8884; text-align: left; } svg { max-width: 100%; height: auto; }
text { fill: currentColor; font: 12px system-ui, sans-serif; }
"""


def plot(found):
    """Bars: how many times faster than the rival; a mark where physics ends."""
    found = [row for row in found]
    most = max([row.physical or row.ratio for row in found] + [row.ratio for row in found] + [1.0]) * 1.15
    left, width, height = 230, 640, 34
    at = lambda value: left + width * min(value / most, 1)
    parts = []
    for index, row in enumerate(found):
        y = 24 + index * height
        label = html.escape(f"{row.case.name}, {disk(row.wire)}" if row.case.disk else row.case.name)
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{at(row.ratio) - left:.1f}" height="20" fill="var(--own)"/>')
        parts.append(f'<text x="{at(row.ratio) + 6:.1f}" y="{y + 14}">{row.ratio:.2f} × {html.escape(row.rival)}</text>')
        if row.physical:
            x = at(row.physical)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + 23}" stroke="var(--limit)" stroke-width="2"/>')
    bottom = 24 + len(found) * height
    parts.append(f'<line x1="{at(1):.1f}" x2="{at(1):.1f}" y1="10" y2="{bottom}" stroke="var(--rival)" stroke-dasharray="4 3"/>')
    return (f'<svg viewBox="0 0 1000 {bottom + 10}" role="img" aria-label="Speed against rivals">' + "".join(parts) + "</svg>")


def page(found):
    head = "".join(f"<th>{html.escape(h)}</th>" for h in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(row)) + "</tr>" for row in found)
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>overspill and its rivals</title><style>{STYLE}</style><h1>overspill and its rivals</h1>"
            "<p>How many times as fast as the rival, in turn in one run, under the same limit and with a cold cache. "
            "Dashed: the rival. Red: what the disk allows, from its measured speed and from the bytes that each must read."
            f"</p>{plot(found)}<div class=scroll><table><tr>{head}</tr>{body}</table></div></html>")


def write(directory, log):
    lines = [json.loads(text) for text in Path(log).read_text().splitlines()]
    found = list(rows(lines))
    (directory / "report.md").write_text(markdown(found))
    (directory / "report.html").write_text(page(found))
    print(markdown(found))
