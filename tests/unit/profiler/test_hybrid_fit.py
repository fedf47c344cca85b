"""`step-oracle fit`: what it reads, what it finds again, and what it refuses."""

from __future__ import annotations

import csv
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from oracle_server.errors import InvalidArgument
from oracle_server.pack import check_pack, compile_pack, load_compiled, open_oracle
from oracle_server.sampling.shape import StepQuery
from profiler.cli import build_app
from profiler.hybrid_fit import FitOptions, fit_hybrid, physics, thin
from profiler.hybrid_pack import FitRequest, fit, write_fit
from profiler.hybrid_report import region_lines
from profiler.hybrid_samples import StepSamples, read_samples
from step_oracle.v1 import trace_pb2

RUN = CliRunner()


def measured_steps(count: int = 600, seed: int = 3, noise: float = 0.0) -> list[dict[str, Any]]:
    """Steps of a device whose cost is known, every third with prefill chunks."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        n = int(random.integers(1, 65))
        contexts = random.integers(50, 3000, size=n)
        chunks = [int(c) for c in random.integers(16, 700, size=random.integers(1, 4))] if number % 3 == 0 else []
        histories = [int(h) for h in random.choice([0, 128, 1000], size=len(chunks))]
        tokens = sum(chunks) + n
        pairs = sum(c * h + c * (c + 1) // 2 for c, h in zip(chunks, histories, strict=True))
        cost = 5e6 + 6_000 * max(0, tokens - 256) + 30_000 * n + 30 * int(contexts.sum())
        cost += 200 * int(contexts.max()) + 3 * pairs + 50_000 * len(chunks)
        rows.append(
            {
                "num_decode_requests": n,
                "num_decode_tokens": n,
                "decode_context_tokens": int(contexts.sum()),
                "max_decode_context_tokens": int(contexts.max()),
                "prefill_chunk_tokens": chunks,
                "prefill_chunk_context_tokens": histories,
                "latency_ns": round(cost * (1 + noise * random.standard_normal())),
            }
        )
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> StepSamples:
    return read_samples(write_table(tmp_path_factory.mktemp("steps") / "steps.parquet", measured_steps())).steps


def test_a_cost_made_of_the_terms_is_found_again(steps: StepSamples) -> None:
    model = fit_hybrid(steps)
    assert np.abs(model.predict(steps) / steps.latency_ns - 1).mean() < 0.001
    found = {(term.name, term.above): term.coefficient_ns for term in model.terms}
    assert found["step", 0.0] == pytest.approx(5e6, rel=0.01)
    assert found["decode_context_tokens", 0.0] == pytest.approx(30, rel=0.02)
    assert found["total_tokens", 256.0] == pytest.approx(6000, rel=0.02)
    assert found["prefill_attention_pairs", 0.0] == pytest.approx(3, rel=0.05)


def test_a_kink_between_measured_lengths_of_prompts_is_told_by_the_costs_on_both_sides() -> None:
    """A device that turns to computing at 145 tokens, and a plan that visits 115 to 128 and 230 to 256, not between."""

    def prompt(tokens: int, scatter: float = 1.0) -> dict[str, Any]:
        cost = (max(8e6, 2.67e6 + 36_700 * tokens) + 2e4) * scatter
        return {"prefill_chunk_tokens": [tokens], "prefill_chunk_context_tokens": [0], "latency_ns": round(cost)}

    random = np.random.default_rng(7)
    visited = [length for most in (16, 32, 64, 128, 256, 512) for length in random.integers(9 * most // 10, most, 12)]
    decode = [{"num_decode_requests": n, "num_decode_tokens": n, "latency_ns": 8_020_000} for n in range(1, 33)]
    for row in decode:
        row |= {"decode_context_tokens": 100 * row["num_decode_requests"], "max_decode_context_tokens": 100}
    measured = [prompt(int(length), 1 + 0.02 * random.standard_normal()) for length in visited]
    model = fit_hybrid(_as_steps(_whole([*measured, *decode])))
    between = _as_steps(_whole([prompt(length) for length in range(130, 230, 5)]))
    error = np.abs(model.predict(between) / between.latency_ns - 1)
    # With kinks at powers of two 0.035 and 0.068.
    assert error.mean() < 0.015
    assert error.max() < 0.04


def test_a_ratio_that_physics_does_not_know_is_learned_where_it_was_measured(steps: StepSamples) -> None:
    """Steps of 20 to 40 requests take 20 % more: no term can say that."""
    slow = (steps.decode_requests >= 20) & (steps.decode_requests <= 40)
    bent = StepSamples(**{**vars(steps), "latency_ns": np.where(slow, steps.latency_ns * 6 // 5, steps.latency_ns)})
    fine = np.arange(len(steps)) // 10 % 5 != 4
    model = fit_hybrid(bent.take(fine))
    test = bent.take(~fine & ~bent.mixed)
    error = np.abs(model.predict(test) / test.latency_ns - 1).mean()
    alone = np.abs(physics(test, model.terms, ()) / test.latency_ns - 1).mean()
    assert error < 0.04
    assert error < 0.5 * alone
    far = StepQuery((), (), 2000, 2000, 2000 * 90_000, 90_000, 2000, 0, 0)
    expected = 5e6 + 6000 * 1744 + 30_000 * 2000 + 30 * 2000 * 90_000
    assert model.oracle().answer(far, 0, 0).latency_ns == pytest.approx(expected, rel=0.25)
    assert model.oracle().answer(far, 0, 0).support == 3


def test_a_measured_shape_is_exact_one_between_is_interpolated_one_beyond_is_extrapolated() -> None:
    rows = [row for row in measured_steps(900, noise=0.002) if not 20 <= row["num_decode_requests"] <= 30]
    oracle = fit_hybrid(_as_steps(rows)).oracle()

    def support(n: int, mean: int) -> tuple[int, int]:
        answer = oracle.answer(StepQuery((), (), n, n, n * mean, 2900, n, 0, 0), 0, 0)
        return answer.support, answer.knowledge

    assert support(50, 1500) == (1, 1)
    assert support(25, 1500) == (2, 2)
    assert support(90, 1500) == (3, 4)
    assert support(50, 5) == (3, 4)


def test_a_fit_is_the_same_bytes_every_time(steps: StepSamples) -> None:
    one, two = fit_hybrid(steps), fit_hybrid(steps)
    assert one.terms == two.terms
    assert all(np.array_equal(one.arrays[name], two.arrays[name]) for name in one.arrays)


def test_pauses_stay_in_the_residuals_and_do_not_bend_the_cost() -> None:
    rows = measured_steps(900, noise=0.005)
    for row in rows[::25]:
        row["latency_ns"] *= 3
    steps = _as_steps(rows)
    model = fit_hybrid(steps)
    calm = np.arange(len(rows)) % 25 != 0
    assert np.abs(model.predict(steps)[calm] / steps.latency_ns[calm] - 1).mean() < 0.02
    assert model.residuals.max() > 2.5
    assert model.residuals.mean() == pytest.approx(1 + 2 / 25, abs=0.03)


def test_thinned_ratios_keep_their_mean_and_their_spread() -> None:
    ratios = np.random.default_rng(1).lognormal(0, 0.2, 10_000)
    few = thin(ratios, 256)
    assert few.size == 256
    assert few.mean() == pytest.approx(ratios.mean(), rel=1e-12)
    assert few.std() == pytest.approx(ratios.std(), rel=0.05)


def test_regions_left_out_are_holes_and_edges_and_never_single_steps(steps: StepSamples) -> None:
    names = [line.region for line in region_lines(steps, FitOptions())]
    assert any(name.startswith("hole: concurrency") for name in names)
    assert any(name.startswith("above: mean context tokens") for name in names)
    assert any(name.startswith("below: prefill tokens") for name in names)


def test_table_csv_and_trace_are_read_alike(tmp_path: Path) -> None:
    rows = measured_steps(60)
    table = read_samples(write_table(tmp_path / "steps.parquet", rows)).steps
    with (tmp_path / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            chunks = {name: " ".join(map(str, row[name])) for name in row if name.startswith("prefill_chunk")}
            writer.writerow({**row, **chunks})
    with (tmp_path / "steps.trace").open("wb") as trace:
        for record in [trace_pb2.TraceRecord(header=trace_pb2.TraceHeader()), *map(_traced, rows)]:
            data = record.SerializeToString()
            trace.write(struct.pack("<I", len(data)) + data)
    for other in (read_samples(tmp_path / "steps.csv").steps, read_samples(tmp_path / "steps.trace").steps):
        assert len(other) == len(table) == 60
        assert all(np.array_equal(getattr(other, name), getattr(table, name)) for name in vars(table))


def test_a_table_with_counts_instead_of_chunks_shares_the_tokens_evenly(tmp_path: Path) -> None:
    rows = [
        {"num_decode_requests": 2, "decode_context_tokens": 100, "latency_ns": 5, "num_prefill_chunks": 3,
         "prefill_tokens": 11}
    ]  # fmt: skip
    file = read_samples(write_table(tmp_path / "steps.parquet", rows))
    assert file.steps.queries[0] == StepQuery((4, 4, 3), (0, 0, 0), 2, 2, 100, 50, 5, 0, 0)
    assert not file.max_context_known


def test_blis_steps_last_from_start_to_start_of_consecutive_ids(tmp_path: Path) -> None:
    ids = [1, 2, 3, 7, 8]
    columns = {
        "step.id": ids,
        "step.ts_start_ns": [0, 10_000, 30_000, 90_000, 105_000],
        "step.duration_us": [1] * 5,
        "batch.num_prefill_reqs": [0, 1, 0, 0, 0],
        "batch.num_decode_reqs": [4, 4, 5, 5, 5],
        "batch.prefill_tokens": [0, 30, 0, 0, 0],
        "batch.decode_tokens": [4, 4, 5, 5, 5],
        "kv.blocks_total_gpu": [1000] * 5,
        "kv.blocks_free_gpu": [900, 890, 890, 890, 890],
        "experiment_id": ["a"] * 5,
    }
    pq.write_table(pa.table(columns), tmp_path / "blis.parquet")
    file = read_samples(tmp_path / "blis.parquet")
    assert file.steps.latency_ns.tolist() == [10_000, 20_000, 15_000]
    assert file.steps.context_tokens.tolist() == [1600, 352 * 4, 352 * 5]
    assert file.steps.queries[1][:2] == ((30,), (352 - 30,))
    assert (file.kv_blocks, dict(file.left_out)) == (1000, {"no next step": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decode_context_tokens": 10**9}, "contradict"),
        ({"num_decode_tokens": 0}, "contradict"),
        ({"latency_ns": -3}, "latency_ns"),
        ({"prefill_chunk_tokens": [0]}, "a chunk has tokens"),
        ({"prefill_chunk_context_tokens": [1, 2, 3, 4, 5]}, "one history"),
    ],
)
def test_a_step_that_cannot_be_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = measured_steps(30)
    rows[4] = {**rows[4], **change}
    with pytest.raises(InvalidArgument, match=message):
        read_samples(write_table(tmp_path / "steps.parquet", rows))


def test_a_table_without_context_and_a_format_nobody_knows_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "steps.parquet", [{"num_decode_requests": 1, "latency_ns": 5}])
    with pytest.raises(InvalidArgument, match="no column decode_context_tokens"):
        read_samples(path)
    with pytest.raises(InvalidArgument, match=r"no column step\.id"):
        read_samples(path, "blis")
    with pytest.raises(InvalidArgument, match="none of auto"):
        read_samples(path, "excel")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_samples(tmp_path / "absent.parquet")


def test_a_fit_without_prefill_steps_is_refused_because_prefill_would_be_free(steps: StepSamples) -> None:
    with pytest.raises(InvalidArgument, match="0 mixed or prefill steps"):
        fit_hybrid(steps.take(~steps.mixed))


def test_a_pack_without_kv_blocks_is_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "steps.parquet", measured_steps(60))
    with pytest.raises(InvalidArgument, match="--kv-blocks-assumed"):
        fit(FitRequest(samples=path, device_name="X", device_memory_bytes=1 << 34))


def test_the_written_pack_answers_as_the_fitted_model(tmp_path: Path) -> None:
    path = write_table(tmp_path / "steps.parquet", measured_steps(300, noise=0.01))
    fitted = fit(FitRequest(samples=path, device_name="X", device_memory_bytes=1 << 34, kv_blocks_assumed=77))
    digest = write_fit(fitted, tmp_path / "pack")
    report = compile_pack(tmp_path / "pack", tmp_path / "compiled")
    assert (report.digest, report.warnings) == (digest, ())
    assert (report.manifest.kv_cache.blocks, report.manifest.kv_cache.basis) == (77, "assumed")
    served, expected = open_oracle(load_compiled(tmp_path / "compiled")), fitted.model.oracle()
    assert served.kind == "hybrid"
    steps = fitted.file.steps
    ratio = [served.answer(query, 1, number).latency_ns for number, query in enumerate(steps.queries)]
    mean = np.mean(ratio / np.array([expected.answer(query, 0, 0).latency_ns for query in steps.queries]))
    assert mean == pytest.approx(1, abs=0.005)
    assert len(served.residual_pool) <= 256


def test_the_command_prints_terms_regions_residuals_and_coverage(tmp_path: Path) -> None:
    path = write_table(tmp_path / "steps.parquet", measured_steps(300, noise=0.01))
    arguments = ["fit", str(path), "-o", str(tmp_path / "pack"), "--device", "X", "--device-memory-gib", "24"]
    result = RUN.invoke(build_app(), [*arguments, "--kv-blocks", "500"])
    assert result.exit_code == 0, result.output
    for word in ("decode_context_tokens", "ns per pair", "share of time", "hole: concurrency", "sigma", "coverage:"):
        assert word in result.output
    assert check_pack(tmp_path / "pack").manifest.kv_cache.blocks == 500


def _whole(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With zeros and no chunks where a row says nothing."""
    counts = ("num_decode_requests", "num_decode_tokens", "decode_context_tokens", "max_decode_context_tokens")
    nothing = {**dict.fromkeys(counts, 0), "prefill_chunk_tokens": [], "prefill_chunk_context_tokens": []}
    return [{**nothing, **row} for row in rows]


def _as_steps(rows: list[dict[str, Any]]) -> StepSamples:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return read_samples(write_table(Path(folder) / "steps.parquet", rows)).steps


def _traced(row: dict[str, Any]) -> trace_pb2.TraceRecord:
    record = trace_pb2.TraceRecord()
    step = record.step
    step.device_start_ns, step.device_finish_ns = 1_000, 1_000 + row["latency_ns"]
    shape = step.request.shape
    for name in ("num_decode_requests", "num_decode_tokens", "decode_context_tokens", "max_decode_context_tokens"):
        setattr(shape, name, row[name])
    for tokens, history in zip(row["prefill_chunk_tokens"], row["prefill_chunk_context_tokens"], strict=True):
        shape.prefill_chunks.add(num_tokens=tokens, context_tokens=history)
    return record
