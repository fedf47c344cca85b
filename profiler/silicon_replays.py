"""The closed loops of `silicon_points`, replayed: a synthesized pack answers the real scheduler of an installed vLLM.

Rows of one pack share one process. The setting is one for all rows and is InferenceMAX's own (its launch scripts and
benchmark client): chunks of up to 8,192 tokens, no prefix caching, lengths drawn evenly from 0.8 to 1.0 of the stated
ones, ten requests a user, all users beginning at once.
"""

from __future__ import annotations

import json
import random
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle_server.errors import FailedPrecondition
from oracle_server.pack import Manifest, compile_pack
from profiler.corrections import schedules_asynchronously
from profiler.replay import launch
from profiler.replay.job import Job, Request, RunSpec, write_requests
from profiler.replay.metrics import known, latencies
from profiler.silicon_points import SiliconPoint
from profiler.synthesize import SynthesisRequest, synthesize, write_synthesis
from profiler.uncertainty import Uncertainty

BATCHED_TOKENS = 8192
SHORTEST = 0.8
REQUESTS_PER_USER = 10
# Of 8,192 output tokens each this leaves two: TPOT moves by -0.4 to -1.2 points (H200, concurrency 16 and 32) and a
# replay takes a fifth of the time.
TOKENS_PER_USER = 16_384


@dataclass(frozen=True)
class Prediction:
    """What the replay of a row says beside what was measured."""

    point: SiliconPoint
    tpot_ms: float
    ttft_ms: float
    preemptions: int
    # Share of steps beyond the tables.
    extrapolated_percent: float
    # What the pack that answered says of itself.
    uncertainty: Uncertainty | None

    @property
    def error_percent(self) -> float:
        """Of TPOT, signed."""
        return 100 * (self.tpot_ms / self.point.tpot_ms - 1)

    @property
    def is_inside(self) -> bool:
        """Whether the measured TPOT lies where the pack's statement has it; a pack without one states nothing."""
        return self.uncertainty is not None and self.uncertainty.holds(self.error_percent)


def predict(
    points: Iterable[SiliconPoint],
    vllm: Path | None,
    *,
    as_launched: bool = False,
    corrections: bool = True,
    processes: int = 2,
    on_row: Callable[[Prediction], None] = lambda _: None,
) -> list[Prediction]:
    """One prediction per point, in the order given; `on_row` sees each as it comes.

    A pack is told what the row says, and with `as_launched` what else is known (`SiliconPoint.launched`).
    """
    points = list(points)
    groups: dict[tuple[object, ...], list[SiliconPoint]] = {}
    for point in points:
        key = (point.model, point.system, point.vllm_version, point.weight_format, point.tensor_parallel)
        groups.setdefault(key, []).append(point)
    # The longest first, so that processes end together.
    ordered = sorted(groups.values(), key=lambda group: -sum(map(_cost, group)))
    python = launch.vllm_python(vllm)
    with tempfile.TemporaryDirectory(prefix="step-oracle-silicon-") as root, ThreadPoolExecutor(processes) as pool:
        running = []
        for number, group in enumerate(ordered):
            folder = Path(root, str(number))
            folder.mkdir()
            # On this thread: the library's operators are of one thread.
            loops = _prepare(group, folder, as_launched, corrections)
            running.append(pool.submit(_run, loops, python, on_row))
        found = {prediction.point.id: prediction for part in running for prediction in part.result()}
    return [found[point.id] for point in points]


def requests_of(point: SiliconPoint) -> list[Request]:
    """The requests of a row's loop; lengths by a seed of the row's own."""
    draw = random.Random(zlib.crc32(point.id.encode()))  # noqa: S311  no secret
    count = point.concurrency * _requests_per_user(point)
    prompts, outputs = point.prompt_tokens, point.output_tokens
    return [
        Request(
            f"loop-{i}", draw.randint(int(SHORTEST * prompts), prompts), draw.randint(int(SHORTEST * outputs), outputs)
        )
        for i in range(count)
    ]


def _requests_per_user(point: SiliconPoint) -> int:
    return max(1, min(REQUESTS_PER_USER, TOKENS_PER_USER // point.output_tokens))


def _cost(point: SiliconPoint) -> int:
    """Steps, weighted as a step of many requests takes longer to schedule."""
    return _requests_per_user(point) * point.output_tokens * (10 + point.concurrency)


@dataclass(frozen=True)
class _Loops:
    """Rows that share a pack, ready to run in one process."""

    points: Sequence[SiliconPoint]
    manifest: Manifest
    job: Job
    folder: Path
    uncertainty: Uncertainty | None


def _prepare(group: Sequence[SiliconPoint], folder: Path, as_launched: bool, corrections: bool) -> _Loops:
    first = group[0]
    asynchronous = schedules_asynchronously(first.vllm_version)
    config, kv_cache_dtype = first.launched() if as_launched else (first.config, "auto")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    synthesis = synthesize(
        SynthesisRequest(
            system=first.system,
            model_directory=model,
            tensor_parallel=first.tensor_parallel,
            vllm_version=first.vllm_version or None,
            max_num_batched_tokens=BATCHED_TOKENS,
            kv_cache_dtype=kv_cache_dtype,
            corrections=corrections,
        )
    )
    write_synthesis(synthesis, folder / "source")
    report = compile_pack(folder / "source", folder / "pack")
    specs = []
    for number, point in enumerate(group):
        path = folder / f"requests-{number}.jsonl"
        write_requests(path, requests_of(point))
        specs.append(RunSpec(seed=0, requests=str(path), users=point.concurrency))
    job = Job(
        compiled_pack=str(folder / "pack"),
        model=str(model),
        requests=specs[0].requests,
        results=str(folder),
        engine_args=(
            *("--max-model-len", str(max(point.prompt_tokens + point.output_tokens for point in group))),
            *("--max-num-batched-tokens", str(BATCHED_TOKENS), "--gpu-memory-utilization", "0.9"),
            *("--max-num-seqs", str(max(point.concurrency for point in group))),
            *("--tensor-parallel-size", str(first.tensor_parallel), "--kv-cache-dtype", kv_cache_dtype),
            "--no-enable-prefix-caching",
            "--async-scheduling" if asynchronous else "--no-async-scheduling",
        ),
        runs=tuple(specs),
    )
    return _Loops(group, report.manifest, job, folder, synthesis.uncertainty)


def _run(loops: _Loops, python: Path, on_row: Callable[[Prediction], None]) -> list[Prediction]:
    predictions: list[Prediction] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "run":
            path = Path(event["path"])
            predictions.append(_prediction(loops.points[len(predictions)], path, loops.uncertainty))
            path.unlink()
            on_row(predictions[-1])

    launch.run_worker(python, loops.job, loops.manifest, loops.folder, on_event)
    return predictions


def _prediction(point: SiliconPoint, path: Path, uncertainty: Uncertainty | None) -> Prediction:
    run = json.loads(path.read_bytes())
    if run["rejected"]:
        raise FailedPrecondition(f"{point.id}: request {run['rejected'][0]} is longer than the engine's max_model_len")
    times = run["requests"]
    columns = ("arrival_ns", "first_token_ns", "last_token_ns", "output_tokens")
    found = latencies(*([entry[name] for entry in times] for name in columns))
    beyond = sum(counts["steps"].get("3", 0) for counts in run["support"])
    return Prediction(
        point=point,
        tpot_ms=float(known(found.tpot).mean()),
        ttft_ms=float(found.ttft.mean()),
        preemptions=sum(entry["preemptions"] for entry in times),
        extrapolated_percent=100 * beyond / max(sum(run["steps"]), 1),
        uncertainty=uncertainty,
    )
