"""What is promised, what was measured, and whether it holds: the last table of `make bench`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from rich.table import Table

from performance import cpu_per_step, held_step, paced_engines

Figures = dict[str, Any]
# (figure as text, whether it holds) of one section's figures.
Verdict = tuple[str, bool]
HELD, MISSED, NOT_MEASURED = "held", "MISSED", "not measured"


def promises(figures: Figures) -> list[dict[str, str]]:
    """One row per promise: promise, figure, bound, verdict and the command that measures it."""
    rows = []
    for section, promise, bound, judge in _PROMISES:
        found = figures.get(section)
        if found is None or "not_measured" in found:
            figure, verdict = (found or {}).get("not_measured", ""), NOT_MEASURED
        else:
            figure, held = judge(found)
            verdict = HELD if held else MISSED
        command = f'make bench ARGS="--only {section}"'
        row = {"promise": promise, "figure": figure, "bound": bound, "verdict": verdict, "command": command}
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, str]]) -> Table:
    """The rows for people."""
    table = Table(title="Promises", title_justify="left")
    for heading in ("promise", "figure", "bound", ""):
        table.add_column(heading)
    for row in rows:
        style = "bold" if row["verdict"] == MISSED else None
        table.add_row(row["promise"], row["figure"], row["bound"], row["verdict"], style=style)
    return table


def _most(value: float, bound: float, form: str = "{:.1f}") -> Verdict:
    return form.format(value), value <= bound


def _cpu(name: str, paced: str, bound: float) -> Callable[[Figures], Verdict]:
    """Where the core is full; what a step costs where it is not stands beside it."""

    def judge(figures: Figures) -> Verdict:
        costs = figures["batch"]["us_per_step"]
        text, held = _spread_at_most(costs[name], bound, 1)
        return f"{text}; paced {costs[paced]['median']:.1f}", held

    return judge


def _spread_at_most(spread: Figures, bound: float, digits: int, scale: float = 1.0) -> Verdict:
    median, low, high = (spread[name] * scale for name in ("median", "low", "high"))
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})", median <= bound


def _times_cheaper(figures: Figures) -> Verdict:
    ratio = figures["batch"]["straightforward_over"][cpu_per_step.LEASES]
    return f"{ratio['median']:.0f} ({ratio['low']:.0f} to {ratio['high']:.0f})", ratio["median"] >= 50


def _paced(kind: str) -> Callable[[Figures], Verdict]:
    def judge(figures: Figures) -> Verdict:
        wanted = paced_engines.PROMISED[kind]
        found = [row for row in figures[f"{kind}_leases"] if row["engines"] == wanted]
        if not found:
            return f"breaks before {wanted:,} engines", False
        (row,) = found
        runs = ", ".join(f"{value:.1f}" for value in row["p99_ms_of_runs"])
        text = f"core {row['core']:.2f}, p99 {row['p99_ms']:.1f} ms (of runs: {runs}), p50 {row['p50_ms']:.2f} ms"
        return text, not row["broken"] and row["core"] <= 0.7 and row["p99_ms"] <= 5

    return judge


def _breaks(figures: Figures) -> Verdict:
    texts = []
    for kind in ("without", "with"):
        last = figures[f"{kind}_leases"][-1]
        texts.append(f"{kind} leases {'' if last['broken'] else 'not '}at {last['engines']:,}")
    return "; ".join(texts), all(figures[f"{kind}_leases"][-1]["broken"] for kind in ("without", "with"))


def _two_shards(figures: Figures) -> Verdict:
    carry = figures["two_carry"]
    return f"{carry['ratio']:.2f} ({carry['low']:.2f} to {carry['high']:.2f})", carry["ratio"] >= 1.8


def _engine_thread(leases: str, bound: float) -> Callable[[Figures], Verdict]:
    def judge(figures: Figures) -> Verdict:
        rows = [row for row in figures["rows"] if row["leases"] == leases]
        text = "; ".join(f"{row['p50']:.0f} with {row['requests']}" for row in rows)
        return text, max(row["p50"] for row in rows) <= bound

    return judge


def _medians(rows: list[Figures], name: Callable[[Figures], float]) -> Iterator[tuple[int, float]]:
    """The median of each concurrency over its rounds and engines."""
    for concurrency in dict.fromkeys(row["concurrency"] for row in rows):
        yield concurrency, statistics.median(name(row) for row in rows if row["concurrency"] == concurrency)


def _lateness(figures: Figures) -> Verdict:
    rows = [row for row in figures["one_engine"] if row["concurrency"] <= 32]
    later = dict(_medians(rows, lambda row: float(row["lateness_p50_us"] - row["bare_sleep_lateness_p50_us"])))
    return "; ".join(f"{value:+.0f} at {n}" for n, value in later.items()), max(later.values()) <= 30


def _period(name: str) -> Callable[[Figures], Verdict]:
    def judge(figures: Figures) -> Verdict:
        step_ms = held_step.STEP_NS / 1e6
        off = dict(_medians(figures[name], lambda row: 100 * (float(row["step_period_p50_ms"]) / step_ms - 1)))
        return "; ".join(f"{value:+.2f} at {n}" for n, value in off.items()), max(map(abs, off.values())) <= 0.3

    return judge


def _leased(figures: Figures) -> Verdict:
    shares = {
        row["workload"]: (row["leased"] / row["leasable"], row["leased"] / row["steps"], row["leasable"] / row["steps"])
        for row in figures["rows"]
    }
    text = "; ".join(f"{name}: {of:.1%} ({all_:.0%} of {top:.0%})" for name, (of, all_, top) in shares.items())
    return text, min(of for of, _, _ in shares.values()) >= 0.97


def _hot_swap(figures: Figures) -> Verdict:
    low, high = figures["ratio_interval"]
    text = f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f}), {figures['pairs']} pairs"
    return text, figures["ratio"] <= 1.5 and figures["pairs"] >= 10


def _resident(figures: Figures) -> Verdict:
    total, before = figures["bytes_with_packs"], figures["bytes_before"]
    text = f"{total / 2**20:.0f} MiB, of them packs {(total - before) / 2**20:.0f}; {figures['packs']} packs"
    return text, total <= 2**30 and figures["packs"] >= 100


def _kernels(group: str, names: tuple[str, ...], bound: float) -> Callable[[Figures], Verdict]:
    return lambda figures: _most(max(figures[group][name]["median"] for name in names), bound, "{:,.0f}")


_ANSWERS = tuple(f"{model}, {kind}" for model in ("composed", "hybrid") for kind in ("decode", "mixed"))
_NEIGHBOURS = tuple(f"the kernel of sampled alone, {kind}" for kind in ("decode", "mixed"))
_PROMISES: tuple[tuple[str, str, str, Callable[[Figures], Verdict]], ...] = (
    (
        "cpu_per_step",
        "server CPU per step with leases, us",
        "<= 9",
        _cpu(cpu_per_step.LEASES, cpu_per_step.PACED_LEASES, 9),
    ),
    ("cpu_per_step", "the straightforward service's, times as much", ">= 50", _times_cheaper),
    (
        "cpu_per_step",
        "server CPU per step without leases, us",
        "<= 70",
        _cpu(cpu_per_step.STREAMS, cpu_per_step.PACED, 70),
    ),
    ("paced_engines", "100 engines without leases", "core <= 0.70, p99 <= 5 ms", _paced("without")),
    ("paced_engines", "1,500 engines with leases", "core <= 0.70, p99 <= 5 ms", _paced("with")),
    ("paced_engines", "the table goes on to where it breaks", "both do", _breaks),
    ("shards", "two shards carry, times one", ">= 1.8", _two_shards),
    ("engine_thread", "engine thread in our code, leased, p50, us", "<= 10", _engine_thread("on", 10)),
    ("engine_thread", "engine thread in our code, asked for, p50, us", "<= 110", _engine_thread("off", 110)),
    ("held_step", "lateness over a bare sleep at concurrency <= 32, p50, us", "<= 30", _lateness),
    ("held_step", "period of a held step of 10 ms, off by, %", "<= 0.3", _period("one_engine")),
    ("held_step", "the same, two engines at 8 requests", "<= 0.3", _period("two_engines")),
    ("lease_share", "leasable steps without a message (of all; ceiling)", ">= 97 %", _leased),
    ("hot_swap", "hot swap under load, ratio of median p99", "<= 1.5, >= 10 pairs", _hot_swap),
    ("readiness", "load of a pack, ms", "<= 50", lambda f: _spread_at_most(f["load_ms"], 50, 2)),
    ("readiness", "process with 100 packs, all pages touched", "<= 1 GiB", _resident),
    ("readiness", "ready after the start, s", "<= 2", lambda f: _spread_at_most(f["ready_seconds"], 2, 2)),
    ("kernels", "neighbour kernel, one call, ns", "<= 1,500", _kernels("single_ns", _NEIGHBOURS, 1500)),
    ("kernels", "batch, per item on decode shapes, ns", "<= 100", _kernels("batch_ns", ("sampled, decode",), 100)),
    ("kernels", "answer of composed and hybrid, ns", "<= 5,000", _kernels("single_ns", _ANSWERS, 5000)),
)
