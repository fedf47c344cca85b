"""Prints a replay: progress while it runs, then the tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from profiler.replay.metrics import METRICS, STATISTICS, summary
from profiler.replay.replay import Replay


class ProgressBar:
    """Follows the worker's events on standard error; silent where that is no terminal. Use as a context manager."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counted]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.disable = not self._bar.console.is_terminal
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        self._task = self._bar.add_task("starting vLLM", total=None, counted="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        if self._task is None:
            return
        if event["event"] == "compiling":
            self._bar.update(
                self._task,
                completed=event["done"],
                total=event["modules"],
                counted=f"{event['done']}/{event['modules']} modules, once for this vLLM",
                description="compiling vLLM's scheduler" if event["done"] < event["modules"] else "starting vLLM",
            )
        elif event["event"] == "started":
            self._bar.update(
                self._task,
                completed=0,
                total=event["requests"],
                counted=f"0/{event['requests']} requests",
                description="replaying",
            )
        elif event["event"] == "progress":
            self._bar.update(
                self._task,
                completed=event["ended"],
                total=event["requests"],
                counted=f"{event['ended']}/{event['requests']} requests  {event['virtual_seconds']:.1f} s virtual",
                description=f"run {event['run'] + 1} of {self._runs}",
            )


def print_replay(console: Console, replay: Replay) -> None:
    """Tables of every run, then what they cost and how far the pack carried them."""
    document = replay.document
    engine = document["engine"]
    console.print(
        f"vLLM {document['vllm_version']}, {engine['num_kv_blocks']} KV blocks of {engine['block_size']} "
        f"({engine['kv_blocks_basis']}), "
        f"max_num_seqs {engine['max_num_seqs']}, max_num_batched_tokens {engine['max_num_batched_tokens']}, "
        f"{'async' if engine['async_scheduling'] else 'sync'} scheduling, "
        f"prefix caching {'on' if engine['prefix_caching'] else 'off'}"
    )
    if replay.compiled_modules:
        console.print(f"{len(replay.compiled_modules)} modules of vLLM ran compiled")
    for sentence in document["warnings"]:
        console.print(f"warning: {sentence}")
    if replay.real is not None and replay.real.kv_blocks not in (None, engine["num_kv_blocks"]):
        console.print(f"note: the measured engine had {replay.real.kv_blocks} KV blocks")
    if document["unmeasured_requests"]:
        console.print(
            f"note: the measured run lacks {document['unmeasured_requests']} requests of --requests: left out here too"
        )
    for number, run in enumerate(document["runs"]):
        if run["rejected_requests"]:
            count = len(run["rejected_requests"])
            limit = engine["max_model_len"]
            console.print(f"warning: run {number}: {count} requests are longer than max_model_len {limit}: left out")
        console.print(_table(replay, number, run))
        speed = replay.speeds[number]
        console.print(
            f"{run['virtual_seconds']:.1f} s in {speed.wall_seconds:.2f} s: {speed.times_real_time:.1f} x real time "
            f"({run['virtual_seconds'] / speed.cpu_seconds:.1f} x by CPU time), "
            f"{speed.steps / speed.wall_seconds:.0f} steps/s; {run['steps']} steps, "
            f"{run['output_tokens']} output tokens, {run['output_tokens_per_second']:.1f} per second, "
            f"{run['prefix_hit_tokens']} prompt tokens from the prefix cache, {run['preemptions']} preemptions"
            + (f", {run['dummy_steps']} steps with a dummy batch" if run["dummy_steps"] else "")
        )
    if replay.null_speed is not None:
        last = replay.speeds[-1]
        console.print(
            f"null oracle: {replay.null_speed.times_real_time:.1f} x real time; the oracle makes the run "
            f"{last.wall_seconds / replay.null_speed.wall_seconds:.3f} times as long"
        )
    for number, run in enumerate(document["runs"]):
        share = run["extrapolated"]
        console.print(
            f"{'' if len(document['runs']) == 1 else f'run {number}: '}extrapolated: {share['steps_percent']:.2f} % of "
            f"the steps, {share['device_time_percent']:.2f} % of the device time"
        )


def _table(replay: Replay, number: int, run: dict[str, Any]) -> Table:
    real = replay.real
    files = {each["requests_file"] for each in replay.document["runs"]}
    title = f"Run {number}, seed {run['seed']}"
    title += f", {run['requests_file']}" if len(files) > 1 else ""
    title += f", beside {real.device or 'the measured run'}" if real else ""
    table = Table(title=title)
    table.add_column("ms")
    for name in STATISTICS:
        table.add_column(name, justify="right")
        if real is not None:
            table.add_column("real", justify="right")
            table.add_column("error", justify="right")
    if real is not None:
        table.add_column("MAPE", justify="right")
    for metric in METRICS:
        ours = run["metrics_ms"][metric]
        cells = [_label(run, metric)]
        measured = None if real is None else summary(getattr(real.latencies, metric))
        for name in STATISTICS:
            cells.append(_cell(ours[name], ".2f"))
            if measured is not None:
                cells += [_cell(measured[name], ".2f"), _cell(run["error_percent"][metric][name], "+.2f", " %")]
        if real is not None:
            cells.append(_cell(run["per_request_mape"][metric], ".2f", " %"))
        table.add_row(*cells)
    return table


def _label(run: dict[str, Any], metric: str) -> str:
    """With the number of requests where not every one has the metric: one output token has no TPOT."""
    count, requests = run["metrics_requests"][metric], len(run["requests"])
    return metric.upper() if count == requests else f"{metric.upper()} ({count} of {requests} requests)"


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "none" if value is None else f"{value:{form}}{unit}"
