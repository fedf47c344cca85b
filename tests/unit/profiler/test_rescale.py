"""Rescaling a composed pack to measured steps."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builders import build_composed_pack, build_sampled_pack, mixed_query, plausible_operators
from oracle_server.errors import InvalidArgument
from oracle_server.pack import check_pack, open_oracle
from oracle_server.sampling.shape import StepQuery
from profiler.cli import main
from profiler.rescale import Parts, fit_rescaling, parts_of
from profiler.rescale_pack import RescaleRequest, rescale, write_rescaled
from profiler.surface import read_pack

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
OPTIONS = {"skew_decode": 0.04, "skew_mixed": 0.06, "launch_floor_ns": 50_000.0, "host_ns_per_step": 2e5}


def build_pack(directory: Path) -> Path:
    operators = plausible_operators()
    operators["all_reduce"] = {(tokens,): 1e5 + 20.0 * tokens for tokens in (1, 64, 8192)}
    build_composed_pack(directory, operators=operators, composed=OPTIONS)
    return directory


def random_steps(count: int, seed: int = 1) -> list[StepQuery]:
    """Decode-only steps and steps with one or two equal chunks."""
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(count):
        n = int(random.integers(1, 250))
        each = int(2 ** random.uniform(4, 13))
        chunks = [(int(random.integers(1, 800)), int(random.integers(0, 4000)))] * int(random.integers(0, 3))
        steps.append(mixed_query(chunks, n, n * each, each))
    return steps


def distorted(parts: Parts, *, dense: float, attention: float, host_ns: float, noise: float) -> NDArray[np.float64]:
    truth = dense * parts.dense + attention * parts.attention + parts.communication + host_ns
    scatter: NDArray[np.float64] = truth * (1.0 + noise * np.random.default_rng(5).standard_normal(truth.size))
    return scatter


def write_trace(path: Path, queries: list[StepQuery], latency_ns: NDArray[np.float64]) -> Path:
    names = (
        "num_decode_requests,decode_context_tokens,max_decode_context_tokens,prefill_chunk_tokens,"
        "prefill_chunk_context_tokens,latency_ns"
    )
    lines = [names]
    for query, latency in zip(queries, latency_ns, strict=True):
        chunks = " ".join(map(str, query.chunk_tokens)), " ".join(map(str, query.chunk_context))
        counts = query.num_decode_requests, query.decode_context_tokens, query.max_decode_context_tokens
        lines.append(",".join(map(str, (*counts, *chunks, round(latency)))))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_parts_of_a_step_add_up_to_what_the_pack_answers(tmp_path: Path) -> None:
    compiled = read_pack(build_pack(tmp_path / "pack"))[1]
    queries = random_steps(50)
    parts = parts_of(compiled, queries)
    oracle = open_oracle(compiled)
    answers = [oracle.answer(query, 0, 0).latency_ns for query in queries]
    assert parts.total == pytest.approx(np.array(answers, dtype=np.float64), abs=3)
    assert parts.host == pytest.approx(2e5, abs=2)
    assert parts.communication.min() >= 1e5
    assert (parts.attention > 0).all()


def test_known_scales_are_found_again(tmp_path: Path) -> None:
    parts = parts_of(read_pack(build_pack(tmp_path / "pack"))[1], random_steps(150))
    fit = fit_rescaling(parts, distorted(parts, dense=1.3, attention=0.8, host_ns=9e5, noise=0.01))
    for estimate, truth in ((fit.dense, 1.3), (fit.attention, 0.8), (fit.host_ns, 9e5)):
        assert estimate.low <= truth <= estimate.high
        assert not estimate.held
    assert fit.dense.value == pytest.approx(1.3, rel=0.03)
    assert abs(fit.after_percent[0]) < 0.3
    assert fit.after_percent[1] < 1.1


def test_intervals_hold_the_truth_as_often_as_they_say(tmp_path: Path) -> None:
    compiled = read_pack(build_pack(tmp_path / "pack"))[1]
    inside = 0
    for seed in range(40):
        parts = parts_of(compiled, random_steps(80, seed))
        noise = 0.02 * np.random.default_rng(100 + seed).standard_normal(80)
        fit = fit_rescaling(
            parts, (1.2 * parts.dense + 0.9 * parts.attention + parts.communication + 2e5) * (1 + noise)
        )
        inside += fit.attention.low <= 0.9 <= fit.attention.high
    # 90 % nominal: 28 of 40 or fewer happen once in 2,600 times; at 50 % they happen 997 times in 1,000.
    assert inside >= 29


def test_steps_that_do_not_tell_a_term_leave_it_as_it_is(tmp_path: Path) -> None:
    compiled = read_pack(build_pack(tmp_path / "pack"))[1]
    # One shape over and over: nothing tells dense work from attention from the host.
    parts = parts_of(compiled, [mixed_query([], 64, 64_000, 1000)] * 60)
    fit = fit_rescaling(parts, distorted(parts, dense=1.1, attention=1.1, host_ns=2e5, noise=0.005))
    assert (fit.host_ns.held, fit.attention.held, fit.dense.held) == (True, True, False)
    assert [fit.attention.value, fit.host_ns.value] == pytest.approx([1.0, 2e5], rel=1e-5)
    assert abs(fit.after_percent[0]) < 0.2


def test_no_term_becomes_negative(tmp_path: Path) -> None:
    parts = parts_of(read_pack(build_pack(tmp_path / "pack"))[1], random_steps(100))
    fit = fit_rescaling(parts, np.maximum(parts.dense - 3e6, 1e6))
    assert min(fit.dense.low, fit.attention.low, fit.host_ns.low) >= 0.0


def test_steps_that_were_measured_wrong_are_left_out(tmp_path: Path) -> None:
    parts = parts_of(read_pack(build_pack(tmp_path / "pack"))[1], random_steps(150))
    latency = distorted(parts, dense=1.3, attention=0.8, host_ns=9e5, noise=0.01)
    latency[::30] *= 20
    fit = fit_rescaling(parts, latency)
    assert fit.outliers == 5
    assert fit.dense.value == pytest.approx(1.3, rel=0.03)


def test_too_few_steps_and_other_kinds_of_packs_are_refused(tmp_path: Path) -> None:
    compiled = read_pack(build_pack(tmp_path / "pack"))[1]
    parts = parts_of(compiled, random_steps(29))
    with pytest.raises(InvalidArgument, match="29 steps; at least 30"):
        fit_rescaling(parts, parts.total)
    build_sampled_pack(tmp_path / "sampled")
    with pytest.raises(InvalidArgument, match="a sampled pack has no operators"):
        parts_of(read_pack(tmp_path / "sampled")[1], random_steps(3))


def test_the_rescaled_pack_answers_what_the_fit_says(tmp_path: Path) -> None:
    directory = build_pack(tmp_path / "pack")
    queries = random_steps(150)
    parts = parts_of(read_pack(directory)[1], queries)
    trace = write_trace(
        tmp_path / "steps.csv", queries, distorted(parts, dense=1.3, attention=0.8, host_ns=9e5, noise=0.01)
    )
    rescaled = rescale(RescaleRequest(directory, trace, steps=100, kv_blocks=777, name="other"))
    assert rescaled.unseen == 50
    assert rescaled.unseen_after_percent[1] < 1.2 < rescaled.unseen_before_percent[1]
    digest = write_rescaled(rescaled, tmp_path / "rescaled", created=NOW)
    report, compiled = read_pack(tmp_path / "rescaled")
    assert report.digest == digest
    oracle = open_oracle(compiled)
    answers = np.array([oracle.answer(query, 0, 0).latency_ns for query in queries], dtype=np.float64)
    assert answers == pytest.approx(parts.rescaled(rescaled.rescaling), rel=1e-9, abs=4)
    manifest = report.manifest
    assert [item.name for item in manifest.corrections] == ["dense_scale", "attention_scale", "host_scale_ns_per_step"]
    assert manifest.provenance["rescaled_from"] == check_pack(directory).digest
    assert (manifest.kv_cache.blocks, manifest.kv_cache.basis, manifest.name) == (777, "measured", "other")
    # A scaled measurement is no measurement.
    assert oracle.answer(mixed_query([], 64, 64 * 1024, 1024), 0, 0).knowledge == 3


def test_two_runs_give_one_pack(tmp_path: Path) -> None:
    directory = build_pack(tmp_path / "pack")
    queries = random_steps(60)
    parts = parts_of(read_pack(directory)[1], queries)
    trace = write_trace(
        tmp_path / "steps.csv", queries, distorted(parts, dense=1.1, attention=1, host_ns=0, noise=0.02)
    )
    digests = {
        write_rescaled(rescale(RescaleRequest(directory, trace)), tmp_path / name, created=NOW) for name in ("a", "b")
    }
    assert len(digests) == 1


def test_the_command_prints_scales_with_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = build_pack(tmp_path / "pack")
    queries = random_steps(150)
    parts = parts_of(read_pack(directory)[1], queries)
    latency = distorted(parts, dense=1.3, attention=0.8, host_ns=9e5, noise=0.01)
    trace = write_trace(tmp_path / "steps.csv", queries, latency)
    arguments: list[Any] = [
        "rescale",
        str(directory),
        "--on",
        str(trace),
        "--steps",
        "100",
        "-o",
        str(tmp_path / "new"),
    ]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "dense      1.3" in told
    assert told.count("90 % between") == 3
    assert "50 other steps: mean error" in told
    assert check_pack(tmp_path / "new").manifest.name == "test-rescaled"
