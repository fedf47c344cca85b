"""The published points of a real MI300X, replayed from the LLM-Emu pack captured on it.

Truth and LLM-Emu's own emulation of it as their authors publish (SOURCES.md). The pack's capture note says "no async
scheduling" and its JSON says async, so both are replayed. The reference itself varies widely in TTFT (+215 % run to
run, by the same authors).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fleet import step_oracle
from gates import Gates
from model_dir import write_model_dir
from replays import replay

pytestmark = [pytest.mark.accuracy, pytest.mark.slow, pytest.mark.nightly]

GATE = "MI300X pack, published points"
SOURCE = "ROCm/rocm-aic @ c379040 (LLM-Emu): published points of a real MI300X, Qwen3-8B"
METRICS = (("TTFT", "ms"), ("TPOT", "ms"), ("throughput", "tokens/s"))
CONTROLS = {"auto": "LLM-Emu auto", "k1": "LLM-Emu K=1"}


class Point(NamedTuple):
    """A closed loop: prompt and output tokens, concurrency, requests; real and LLM-Emu's TTFT ms, TPOT ms, tokens/s."""

    prompt: int
    output: int
    concurrency: int
    requests: int
    real: tuple[float, float, float]
    llm_emu: tuple[float, float, float]


POINTS = (
    Point(1024, 128, 1, 12, (53.23, 5.11, 182.2), (45.42, 5.47, 173.0)),
    Point(1024, 128, 16, 64, (332.2, 8.65, 1428.0), (202.8, 12.13, 1173.0)),
    Point(4096, 128, 8, 32, (828.3, 12.04, 433.1), (757.8, 13.01, 423.7)),
)


@pytest.fixture(scope="module")
def packs(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mi300x")
    source = str(data_folder / "llm_emu_packs" / "MI300X-Qwen3-8B.json")
    made = {}
    for name, control in (("ours", ()), ("auto", ("--control", "auto")), ("k1", ("--control", "k1"))):
        made[name] = folder / name
        names = ("--architecture", "Qwen3ForCausalLM", "--dtype", "bfloat16", "-o", str(made[name]))
        step_oracle("import", "llm-emu", source, *names, *control)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model") / "qwen3-8b", "qwen3-8b")


@pytest.mark.parametrize("scheduling", ["async", "sync"])
@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p.prompt}x{p.output}c{p.concurrency}")
def test_the_published_points(
    point: Point, scheduling: str, packs: dict[str, Path], model: Path, gates: Gates, tmp_path: Path
) -> None:
    flag = "--async-scheduling" if scheduling == "async" else "--no-async-scheduling"
    engine = f"--max-model-len 8192 --max-num-batched-tokens 4096 --gpu-memory-utilization 0.85 {flag}"
    loop = ("--users", str(point.concurrency), "--loop-requests", str(point.requests))
    lengths = ("--prompt-tokens", str(point.prompt), "--output-tokens", str(point.output))
    # A control costs a start of vLLM: where the promise is, both; elsewhere LLM-Emu's default.
    controls_here = [] if scheduling == "sync" else ["auto", "k1"] if point.concurrency == 16 else ["auto"]
    found = {f"replayed, {scheduling}": (0.0, 0.0, 0.0), "LLM-Emu published": point.llm_emu}
    for name in ("ours", *controls_here):
        arguments = (*loop, *lengths, "--engine-args", f"{engine} --no-enable-prefix-caching")
        found[CONTROLS.get(name, f"replayed, {scheduling}")] = _metrics(
            replay(packs[name], model, tmp_path, *arguments), point
        )
    label = f"{point.prompt} in, {point.output} out, concurrency {point.concurrency}"
    gates.source(GATE, SOURCE)
    for i, (metric, unit) in enumerate(METRICS):
        gates.points(GATE, metric, {label: point.real[i]}, series="measured", unit=unit)
        for series, values in found.items():
            gates.points(GATE, metric, {label: values[i]}, series=series, unit=unit)
        errors = {series: 100 * (values[i] / point.real[i] - 1) for series, values in found.items()}
        ours = errors.pop(f"replayed, {scheduling}")
        # The promise: at concurrency 16 closer than LLM-Emu's published emulation, but for TTFT.
        promised = point.concurrency == 16 and metric != "TTFT"
        at_most = round(abs(errors["LLM-Emu published"]), 1) if promised else None
        gates.check(GATE, f"{label}, {scheduling}: {metric}", ours, at_most=at_most, controls=errors)


def _metrics(result: dict[str, Any], point: Point) -> tuple[float, float, float]:
    """Mean TTFT and mean TPOT in milliseconds, output tokens per second."""
    metrics = result["metrics_ms"]
    assert result["runs"][0]["output_tokens"] == point.requests * point.output, json.dumps(result["runs"][0])[:500]
    return metrics["ttft"]["mean"], metrics["tpot"]["mean"], result["runs"][0]["output_tokens_per_second"]
