"""The figures as tables for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

Figures = dict[str, Any]


def show(console: Console, section: str, figures: Figures) -> None:
    """Print one section."""
    for table in _TABLES[section](figures):
        console.print(table)


def spread(value: Figures, digits: int = 1, scale: float = 1.0) -> str:
    """12.3 (11.9 to 14.0)."""
    median, low, high = (value[name] * scale for name in ("median", "low", "high"))
    return f"{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _cpu_per_step(figures: Figures) -> Iterable[Table]:
    for policy in ("batch", "other"):
        found = figures[policy]
        table = _table(
            f"Server CPU per step, all servers under SCHED_{policy.upper()}: {figures['engines']} connections, one "
            f"message in flight on each where not paced, {figures['mixed_share']:.1%} mixed steps, "
            f"{figures['leased_share_of_leasable']:.1%} of leasable ones leased",
            "stack",
            "us per step",
            "straightforward / it",
            "it / bare socket",
        )
        for name, cost in found["us_per_step"].items():
            faster = found["straightforward_over"].get(name)
            table.add_row(name, spread(cost), spread(faster) if faster else "1", spread(found["over_raw_socket"][name]))
        yield table


def _paced_engines(figures: Figures) -> Iterable[Table]:
    for kind in ("without_leases", "with_leases"):
        share = f", {figures['leased_share_of_all']:.1%} of the steps leased" if kind == "with_leases" else ""
        table = _table(
            f"Paced engines {kind.replace('_', ' ')}: 50 steps/s each{share}",
            *("engines", "core used", "waited for", "steps/s", "messages/s", "us/step", "p50 ms", "p99 ms"),
            *("generator core", "sends late p99 us", "held back", ""),
        )
        for row in figures[kind]:
            table.add_row(
                f"{row['engines']:,}",
                f"{row['core']:.2f}",
                f"{row['waited']:.2f}",
                f"{row['steps_per_second']:,.0f}",
                f"{row['messages_per_second']:,.0f}",
                f"{row['us_per_step']:.1f}",
                f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}",
                f"{row['generator_core']:.2f}",
                f"{row['send_late_p99_us']:.0f}",
                f"{row['window_stalls'] + row['socket_stalls']}",
                f"broken ({row['why']})" if row["broken"] else "",
            )
        yield table


def _kernels(figures: Figures) -> Iterable[Table]:
    table = _table("Kernels, ns of CPU", "kernel", "one call", "item of a batch of 1,024")
    for name, cost in figures["single_ns"].items():
        batch = figures["batch_ns"].get(name)
        table.add_row(name, spread(cost, 0), spread(batch, 0) if batch else "")
    yield table


def _growth(figures: Figures) -> Iterable[Table]:
    table = _table("Server CPU per message, no leases", "load", "us")
    for name, cost in figures["us_per_message"].items():
        table.add_row(name, spread(cost))
    yield table


def _hot_swap(figures: Figures) -> Iterable[Table]:
    low, high = figures["ratio_interval"]
    table = _table(
        f"Hot swap of a pack of 276,000 samples under {figures['engines']} streams x 50 steps/s: {figures['pairs']} "
        f"pairs, {figures['swaps']} swaps",
        "",
        "answer time p99, ms",
        "longest, ms",
    )
    for kind in ("without", "with"):
        table.add_row(f"{kind} swaps", spread(figures["p99_ms"][kind], 2), spread(figures["longest_ms"][kind], 2))
    table.add_row("ratio of median p99, 95 % interval", f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})", "")
    table.add_row("one activation, ms", spread(figures["swap_ms"]), "")
    yield table


def _readiness(figures: Figures) -> Iterable[Table]:
    table = _table("Packs and start", "", "")
    table.add_row(f"load of a pack of {figures['samples']:,} samples, ms", spread(figures["load_ms"], 2))
    added = figures["bytes_with_packs"] - figures["bytes_before"]
    table.add_row(
        f"resident memory of a process with {figures['packs']} such packs, all pages touched",
        f"{figures['bytes_with_packs'] / 2**20:.0f} MiB, of them packs {added / 2**20:.0f} MiB",
    )
    table.add_row("ready after the start, warm cache, s", spread(figures["ready_seconds"], 2))
    yield table


def _shards(figures: Figures) -> Iterable[Table]:
    table = _table(f"Two shards beside one process, {figures['engines']} connections, one message in flight", "", "")
    table.add_row("us per message of one process", spread(figures["us_per_message_of_one_process"]))
    table.add_row("… of one of two shards", spread(figures["us_per_message_of_a_shard"]))
    table.add_row("… of the other processes meanwhile", spread(figures["us_per_message_elsewhere"]))
    table.add_row("connections of the fuller shard, %", spread(figures["share_of_the_fuller_shard"], scale=100))
    carry = figures["two_carry"]
    table.add_row("two shards carry, times one", f"{carry['ratio']:.2f} ({carry['low']:.2f} to {carry['high']:.2f})")
    yield table


def _engine_thread(figures: Figures) -> Iterable[Table]:
    from performance.engine_thread import table_of

    yield table_of(figures["rows"], figures["vllm"])


def _held_step(figures: Figures) -> Iterable[Table]:
    from performance.held_step import table_of

    for name in ("one_engine", "two_engines"):
        yield table_of(figures[name], f"A held step of 10 ms, vLLM {figures['vllm']}, {name.replace('_', ' ')}")


def _lease_share(figures: Figures) -> Iterable[Table]:
    table = _table("Steps answered without a message", "workload", "steps", "of leasable", "of all", "ceiling")
    for row in figures["rows"]:
        shares = (row["leased"] / row["leasable"], row["leased"] / row["steps"], row["leasable"] / row["steps"])
        table.add_row(row["workload"], f"{row['steps']:,}", *(f"{share:.2%}" for share in shares))
    yield table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


_TABLES: dict[str, Callable[[Figures], Iterable[Table]]] = {
    "cpu_per_step": _cpu_per_step,
    "paced_engines": _paced_engines,
    "kernels": _kernels,
    "growth": _growth,
    "hot_swap": _hot_swap,
    "readiness": _readiness,
    "shards": _shards,
    "engine_thread": _engine_thread,
    "held_step": _held_step,
    "lease_share": _lease_share,
}
