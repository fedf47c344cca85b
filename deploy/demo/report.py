"""The figures of a run: as JSON, and as a table for people."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from deploy.demo.measurement import Engine, Period
from deploy.demo.packs import StepCosts

SCHEMA = "step_oracle.demo/1"
COLUMNS = 110


@dataclass(frozen=True)
class Bound:
    """One side of the swap: the pack that answered, and what it says two steps cost."""

    gpu: str
    device: str
    pack_digest: str
    generation: int
    costs: StepCosts


@dataclass(frozen=True)
class Report:
    """Everything the demo measured; field names carry the units."""

    vllm_version: str
    model: str
    requests_per_second: float
    kv_blocks: int
    before: Bound
    after: Bound
    engines: Mapping[str, Engine]
    # `step-oracle recompute` over the traces of both engines.
    replies_recomputed_equal: int
    replies_recomputed_different: int
    activate_seconds: float
    total_seconds: float

    @property
    def failed_requests(self) -> int:
        return sum(engine.failed_requests for engine in self.engines.values())

    def faults(self) -> list[str]:
        """One sentence for everything that must not happen."""
        found = []
        for name, engine in self.engines.items():
            if engine.failed_requests:
                found.append(f"{name}: {engine.failed_requests} of {engine.requests} requests failed")
            if engine.replies_without_generation:
                found.append(f"{name}: {engine.replies_without_generation} replies name no generation")
            if engine.generation_went_back:
                found.append(f"{name}: an older generation answered after a newer one")
        if self.replies_recomputed_different:
            found.append(f"{self.replies_recomputed_different} replies differ when they are computed again")
        return found


def write_json(report: Report, path: Path) -> None:
    """The same figures, unrounded."""
    document = {"schema": SCHEMA, "failed_requests": report.failed_requests, **dataclasses.asdict(report)}
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_report(report: Report, console: Console | None = None) -> None:
    """The table, what its columns of the packs mean, and the counts that make it credible."""
    console = console or Console(highlight=False, markup=False)
    if not console.is_terminal or console.width > COLUMNS:
        console.width = COLUMNS
    console.print(_table(report))
    before, after = report.before.costs, report.after.costs
    console.print(
        "The packs' columns were asked from the packs alone, for the steps the schedulers made; a decode step was one "
        f"of {before.decode_requests_p50} requests with {before.decode_context_tokens_p50:,} tokens of context "
        f"({report.before.gpu}) or {after.decode_requests_p50} with {after.decode_context_tokens_p50:,} "
        f"({report.after.gpu}; medians). Beside TTFT stands a step with a prompt in it, to which the steps already "
        "under way and vLLM's own work add; beside TPOT a decode step, to which the prompts of others add.",
        style="dim",
    )
    facts = Table.grid(padding=(0, 1))
    for line in _facts(report):
        facts.add_row("•", line)
    console.print(facts)


_Cell = Callable[[Period], str]
_PERIOD_ROWS: tuple[tuple[str, _Cell], ...] = (
    ("requests", lambda period: f"{period.requests}"),
    ("TTFT p50, ms", lambda period: f"{period.ttft_ms.p50:.1f}"),
    ("TTFT p99, ms", lambda period: f"{period.ttft_ms.p99:.1f}"),
    ("TPOT p50, ms", lambda period: f"{period.tpot_ms.p50:.2f}"),
    ("TPOT p99, ms", lambda period: f"{period.tpot_ms.p99:.2f}"),
    ("ITL p50, ms", lambda period: f"{period.itl_ms.p50:.2f}"),
    ("ITL mean, ms", lambda period: f"{period.itl_ms.mean:.2f}"),
    ("ITL p99, ms", lambda period: f"{period.itl_ms.p99:.2f}"),
    ("E2E p50, ms", lambda period: f"{period.e2e_ms.p50:.0f}"),
    ("output tokens/s", lambda period: f"{period.output_tokens_per_second:.0f}"),
    ("decode step p50, ms", lambda period: f"{period.decode_period_ms.p50:.2f}"),
    ("steps", lambda period: f"{period.steps:,}"),
    ("lateness p50, µs", lambda period: f"{period.lateness_us.p50:.0f}"),
    ("lateness p99, µs", lambda period: f"{period.lateness_us.p99:.0f}"),
    ("late answers", lambda period: f"{period.late_answers}"),
    ("extrapolated steps", lambda period: f"{period.extrapolated_share:.1%}"),
)
_SECTION_AFTER = ("requests", "output tokens/s")


def _table(report: Report) -> Table:
    bounds = (report.before, report.after)
    table = Table(
        title=f"{report.model}, vLLM {report.vllm_version}, {report.requests_per_second:g} requests/s per engine, "
        f"{report.kv_blocks:,} KV blocks",
        title_justify="left",
        title_style="bold",
        header_style="",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in report.engines:
        for when, bound in zip(("before", "after"), bounds, strict=True):
            table.add_column(f"{name}\n{when}: {bound.gpu}", justify="right", no_wrap=True)
    for bound in bounds:
        table.add_column(f"pack says\n{bound.gpu}", justify="right", no_wrap=True, style="cyan")
    says = _pack_says(report)
    for label, cell in _PERIOD_ROWS:
        measured = [cell(period) for engine in report.engines.values() for period in (engine.before, engine.after)]
        table.add_row(label, *measured, *says.get(label, ("", "")), end_section=label in _SECTION_AFTER)
    return table


def _pack_says(report: Report) -> dict[str, tuple[str, str]]:
    engines = report.engines.values()
    tokens = sum(engine.median_output_tokens for engine in engines) / len(engines)
    sides = (report.before.costs, report.after.costs)

    def both(cell: Callable[[StepCosts], str]) -> tuple[str, str]:
        return cell(sides[0]), cell(sides[1])

    return {
        "TTFT p50, ms": both(lambda costs: f"> {costs.prompt_step_p50_ms:.1f}"),
        "TPOT p50, ms": both(lambda costs: f"> {costs.decode_step_p50_ms:.2f}"),
        "ITL p50, ms": both(lambda costs: f"{costs.decode_step_p50_ms:.2f}"),
        "ITL mean, ms": both(lambda costs: f"{costs.token_wait_mean_ms:.2f}"),
        "E2E p50, ms": both(
            lambda costs: f"≈ {costs.prompt_step_p50_ms + (tokens - 1) * costs.token_wait_mean_ms:.0f}"
        ),
        "decode step p50, ms": both(lambda costs: f"{costs.decode_step_p50_ms:.2f}"),
    }


def _facts(report: Report) -> list[str]:
    engines = report.engines
    total = sum(engine.requests for engine in engines.values())
    lengths = " and ".join(
        f"{engine.median_prompt_tokens} + {engine.median_output_tokens}" for engine in engines.values()
    )
    across = ", ".join(f"{name} {engine.requests_across_the_swap}" for name, engine in engines.items())
    swaps = ", ".join(f"{name} {engine.swap_at_seconds:.1f} s" for name, engine in engines.items())
    generations = "; ".join(
        f"{name} {', '.join(f'{count:,} by {number}' for number, count in engine.steps_by_generation.items())}"
        for name, engine in engines.items()
    )
    unnamed = sum(engine.replies_without_generation for engine in engines.values())
    requests = f"requests: {total} (medians: {lengths} tokens), failed: {report.failed_requests}"
    command = f"the command took {report.activate_seconds:.1f} s"
    return [
        requests,
        f"requests that ran across the swap, in neither column: {across}",
        f"first step of the new generation: {swaps} after the first request ({command})",
        f"steps by generation, with the warm-up: {generations}; replies without a generation: {unnamed}",
        _recomputed(report),
    ]


def _recomputed(report: Report) -> str:
    equal, different = report.replies_recomputed_equal, report.replies_recomputed_different
    return f"replies recomputed from the stored packs: {equal:,} equal, {different} different"
