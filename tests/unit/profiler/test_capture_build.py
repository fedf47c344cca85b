"""A capture into a pack, and a pack against a capture: the truth of these steps is known."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

import captures
from builders import build_constant_pack
from fleet import step_oracle
from oracle_server import pack
from oracle_server.errors import InvalidArgument
from profiler.capture.build import BuildRequest, build_pack
from profiler.capture.evaluate import DRAWS, evaluate, interval_of
from profiler.capture.step_times import settled_runs
from profiler.capture.steps import CapturedStep, read_capture
from profiler.capture.table import COLUMNS, write_table
from profiler.pack_compare import compare_packs

CREATED = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture")
    captures.write_run(folder, captures.steps(600, seed=1))
    return folder


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    captures.write_run(folder, captures.steps(300, seed=2))
    return folder


@pytest.fixture(scope="module", params=["hybrid", "sampled"])
def built(request: pytest.FixtureRequest, capture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pack") / str(request.param)
    build_pack(BuildRequest(capture, str(request.param), licence="CC0-1.0"), directory, created=CREATED)
    return directory


def test_the_server_would_take_the_pack_and_its_manifest_is_the_engines(built: Path) -> None:
    manifest = pack.check_pack(built).manifest

    assert (manifest.model.id, manifest.model.dtype, manifest.model.quantization) == ("tiny", "bfloat16", "none")
    assert (manifest.device.name, manifest.device.memory_bytes) == ("AMD EPYC", 24 << 30)
    assert (manifest.kv_cache.blocks, manifest.kv_cache.block_size, manifest.kv_cache.basis) == (682, 128, "measured")
    assert manifest.kv_cache.bytes_per_token == 12288
    assert (manifest.engine.max_num_seqs, manifest.engine.async_scheduling) == (64, False)
    assert (manifest.engine.attention_backend, manifest.engine.model_runner) == ("CPU_ATTN", "v1")
    assert (manifest.latency.prep_ns, manifest.latency.copy_ns) == (captures.PREP_NS, captures.COPY_NS)
    assert manifest.latency.host == pack.HostTime(step_ns=captures.HOST_NS, request_ns=captures.HOST_NS_PER_REQUEST)
    assert manifest.licence == "CC0-1.0"


@pytest.mark.slow
def test_one_capture_builds_one_pack(capture: Path, built: Path, tmp_path: Path) -> None:
    kind = pack.check_pack(built).manifest.kind
    again = build_pack(BuildRequest(capture, kind, licence="CC0-1.0"), tmp_path / "again", created=CREATED)

    assert again.digest == pack.check_pack(built).digest


def test_errors_on_other_steps_are_as_small_as_their_noise(built: Path, held_out: Path) -> None:
    evaluation = evaluate(built, held_out)

    assert evaluation.held_out == {"run-001": True}
    assert evaluation.overall.steps == 300
    assert evaluation.overall.mape < 2.0
    assert abs(evaluation.overall.bias) < 1.0
    # 300 steps of 90 %: within four standard errors of it. Cells of few samples draw less scatter than there is.
    least = 90 - 4 * 100 * math.sqrt(0.9 * 0.1 / 300) if built.name == "hybrid" else 70
    assert least < evaluation.overall.coverage < 97
    assert sum(region.steps for region in evaluation.regions) == 300
    assert sum(evaluation.overall.support.values()) == pytest.approx(100)


def test_a_run_the_pack_was_made_of_is_called_so(built: Path, capture: Path) -> None:
    evaluation = evaluate(built, capture)

    assert evaluation.held_out == {"run-001": False}
    assert evaluation.overall.group == "all (in the pack)"
    assert "no run is held out" in evaluation.notes[0]


def test_where_a_run_is_held_out_the_others_do_not_count_in_the_sum_and_the_regions(
    built: Path, capture: Path, tmp_path: Path
) -> None:
    """A capture that was resumed: the run the pack knows by heart, and a slower one it does not know."""
    shutil.copytree(capture, tmp_path, dirs_exist_ok=True)
    captures.write_run(tmp_path, captures.steps(100, seed=3, factor=1.25), number=2)
    evaluation = evaluate(built, tmp_path)

    assert evaluation.held_out == {"run-001": False, "run-002": True}
    assert (evaluation.overall.group, evaluation.overall.steps) == ("held-out runs", 100)
    assert evaluation.overall.bias == pytest.approx(-20, abs=2)
    assert sum(region.steps for region in evaluation.regions) == 100
    assert [(run.group, run.steps) for run in evaluation.runs] == [("run-001", 600), ("run-002", 100)]
    assert evaluation.notes == ("run-001 is in the pack: left out of the first row and of the regions",)


def test_nine_of_ten_further_draws_fall_into_the_interval_of_the_draws() -> None:
    """The mean over 2,000 intervals of the share of the distribution they hold; its standard error is 0.001."""
    source = np.random.default_rng(5)
    inside = []
    for _ in range(2000):
        low, high = interval_of(source.lognormal(size=DRAWS))
        inside.append(_lognormal_share(high) - _lognormal_share(low))

    assert np.mean(inside) == pytest.approx(0.9, abs=0.005)


def test_a_slower_device_shows_as_a_bias(built: Path, tmp_path: Path) -> None:
    captures.write_run(tmp_path, captures.steps(300, seed=3, factor=1.25))

    assert evaluate(built, tmp_path).overall.bias == pytest.approx(-20, abs=1.5)


def test_steps_of_the_warm_up_and_the_first_ones_are_left_out_and_counted(tmp_path: Path) -> None:
    made = captures.steps(400)
    run = captures.write_run(tmp_path, made)
    (run / "plan.jsonl").write_text(
        json.dumps({"event": "warm-up begins", "monotonic_ns": made[0].dispatch_ns})
        + "\n"
        + json.dumps({"event": "warm-up ends", "monotonic_ns": made[50].dispatch_ns})
    )
    built = build_pack(BuildRequest(tmp_path, "sampled", skip_steps=10), tmp_path / "pack")

    assert built.lines[0] == "  340 steps of 1 runs; left out: 50 of the warm-up, 10 first of a run"
    assert pack.check_pack(tmp_path / "pack").manifest.coverage["steps"] == 340


def test_a_pack_of_parts_of_a_run_holds_the_steps_of_those_alone(tmp_path: Path) -> None:
    """Parts side by side hold every step once; the command says what it left out."""
    made = captures.steps(300)
    captures.write_run(tmp_path / "capture", [*made[:120], *captures.steps(300, factor=2.0)[120:]])
    told, parts = [], []
    for name, spans in (("one", ("0:40", "80:120")), ("other", ("40:80", "120:500"))):
        command = ("build", str(tmp_path / "capture"), "--kind", "sampled", "-o", str(tmp_path / name))
        steps = (part for span in spans for part in ("--steps", span))
        told.append(step_oracle(*command, *steps).splitlines()[1])
        parts.append(pq.read_table(tmp_path / name / "samples.parquet")["latency_ns"].to_pylist())

    assert told == [
        "  80 steps of 1 runs; left out: 220 not asked for",
        "  220 steps of 1 runs; left out: 80 not asked for",
    ]
    assert sorted(parts[0]) == sorted(step.latency_ns for step in (*made[:40], *made[80:120]))
    assert len(parts[1]) == 220


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--steps", "9"), "give FROM:TO, two whole numbers"),
        (("--steps", "9:9"), "steps 9:9 are none"),
        (("--steps", "0:9", "--skip-steps", "3"), "give one of them"),
    ],
)
def test_steps_that_are_none_are_refused(capture: Path, tmp_path: Path, options: Sequence[str], said: str) -> None:
    command = [sys.executable, "-m", "profiler.cli", "build", str(capture), "-o", str(tmp_path / "pack"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "pack").exists()


def test_decode_steps_right_after_a_prompt_are_fitted_only_where_there_are_no_others(tmp_path: Path) -> None:
    """A plan puts prompts beside every batch size, so most of its decode steps there come right after one."""
    index, made = 0, []
    for requests, after in ((2, 12), (8, 3)):
        for place in 2 * [*range(1 + after)]:
            (step,) = captures.steps(1)
            chunks = (64,) if place == 0 else ()
            made.append(step._replace(step_index=index, chunk_tokens=chunks, num_decode_requests=requests))
            index += 1
    captures.write_run(tmp_path, captures.steps(50))
    run = replace(read_capture(tmp_path)[0], steps=tuple(made))

    (settled,), unsettled = settled_runs([run])

    assert len(unsettled) == 4
    kept = Counter((step.num_decode_requests, bool(step.chunk_tokens)) for step in settled.steps)
    assert kept == {(2, True): 2, (2, False): 20, (8, True): 2, (8, False): 6}


def test_a_pack_is_not_slowed_by_decode_steps_right_after_prompts(tmp_path: Path) -> None:
    """Half as slow again after each prompt, and steady from the third on."""
    made = [
        step._replace(device_end_ns=step.device_end_ns + step.latency_ns // 2)
        if step.step_index % 4 in (1, 2)
        else step
        for step in captures.steps(800)
    ]
    captures.write_run(tmp_path / "capture", made)
    captures.write_run(tmp_path / "steady", [step for step in captures.steps(400, seed=3) if step.step_index % 4 == 3])

    built = build_pack(BuildRequest(tmp_path / "capture", licence="CC0-1.0"), tmp_path / "pack")

    assert "  not fitted: 400 decode steps, the first 2 after a prompt's" in built.lines
    assert abs(evaluate(tmp_path / "pack", tmp_path / "steady").overall.bias) < 1.0


@pytest.mark.parametrize(("slower", "told"), [(1.12, 1.12), (0.9, 0.9), (1.003, None)])
def test_how_much_longer_the_first_decode_step_after_a_prompt_takes_is_in_the_pack(
    tmp_path: Path, slower: float, told: float | None
) -> None:
    """In steps of a third capture it is in the answers, and in those of no other step."""

    def after_prompts(made: Sequence[CapturedStep]) -> list[CapturedStep]:
        return [
            step._replace(
                device_end_ns=step.device_start_ns + round(slower * step.latency_ns), previous_prefill_tokens=200
            )
            if step.step_index % 4 == 1
            else step
            for step in made
        ]

    captures.write_run(tmp_path / "capture", after_prompts(captures.steps(1200)))
    others = after_prompts(captures.steps(800, seed=3))
    for place in (1, 3):
        captures.write_run(tmp_path / f"other-{place}", [step for step in others if step.step_index % 4 == place])

    built = build_pack(BuildRequest(tmp_path / "capture", licence="CC0-1.0"), tmp_path / "pack")

    found = pack.hybrid_latency(pack.check_pack(tmp_path / "pack").manifest).after_prefill_factor
    assert (None if isinstance(found, msgspec.UnsetType) else found) == (told and pytest.approx(told, rel=0.005))
    assert any(line.startswith("  after prefill: ") for line in built.lines) is (told is not None)
    for place in (1, 3):
        assert abs(evaluate(tmp_path / "pack", tmp_path / f"other-{place}").overall.bias) < 1.0


@pytest.mark.parametrize(("drift", "least", "most"), [(0.0, 0.0, 0.5), (0.1, 7.0, 13.0)])
def test_a_device_that_does_not_hold_still_is_told(tmp_path: Path, drift: float, least: float, most: float) -> None:
    """Faster or slower by this for six seconds each."""
    made = [
        step._replace(device_end_ns=step.device_end_ns + round(drift * step.latency_ns * (-1) ** (at // 6_000_000_000)))
        for step in captures.steps(3_000)
        for at in (step.device_start_ns,)
    ]
    captures.write_run(tmp_path / "capture", made)

    built = build_pack(BuildRequest(tmp_path / "capture", licence="CC0-1.0"), tmp_path / "pack")

    (line,) = (line for line in built.lines if line.startswith("  how still the device held: "))
    percent = float(line.partition("were ")[2].partition(" %")[0])
    assert least <= percent <= most
    assert ("it drifts" in line) is (drift > 0)
    held = pack.check_pack(tmp_path / "pack").manifest.provenance["how still the device held"]
    assert held in line


def test_a_few_steps_after_prompts_tell_nothing_of_them(tmp_path: Path) -> None:
    made = [
        step._replace(device_end_ns=step.device_end_ns + step.latency_ns, previous_prefill_tokens=200)
        if step.step_index % 4 == 1 and step.step_index < 60
        else step
        for step in captures.steps(800)
    ]
    captures.write_run(tmp_path / "capture", made)
    build_pack(BuildRequest(tmp_path / "capture", licence="CC0-1.0"), tmp_path / "pack")
    hybrid = pack.hybrid_latency(pack.check_pack(tmp_path / "pack").manifest)
    assert isinstance(hybrid.after_prefill_factor, msgspec.UnsetType)


def paused(made: Sequence[CapturedStep], seconds: Sequence[float], every: int) -> list[CapturedStep]:
    """Every so many steps a pause, one of these in turn; the step after takes 10 ms longer for each factor of 4."""
    shifted, shift_ns = [], 0
    for number, step in enumerate(made):
        extra_ns = 0
        if number and number % every == 0:
            pause = seconds[number // every % len(seconds)]
            extra_ns = round(1e7 * math.log(pause / 0.1, 4))
            shift_ns += round(pause * 1e9)
        times = {
            name: getattr(step, name) + shift_ns
            for name in ("dispatch_ns", "device_start_ns", "device_end_ns", "result_ns")
        }
        shift_ns += extra_ns
        times |= {name: times[name] + extra_ns for name in ("device_end_ns", "result_ns")}
        shifted.append(step._replace(**times))
    return shifted


def test_what_steps_take_longer_after_a_pause_is_in_the_pack_and_not_in_its_other_steps(tmp_path: Path) -> None:
    pauses = (0.1, 0.4, 1.6, 6.4)
    captures.write_run(tmp_path / "capture", paused(captures.steps(800), pauses, 20))
    captures.write_run(tmp_path / "other", paused(captures.steps(300, seed=3), pauses, 10))
    built = build_pack(BuildRequest(tmp_path / "capture", licence="CC0-1.0"), tmp_path / "pack")
    wake = pack.check_pack(tmp_path / "pack").manifest.latency.wake

    assert any(line.startswith("  wake: 39 steps after a pause take longer by ") for line in built.lines)
    assert not isinstance(wake, msgspec.UnsetType)
    assert [round(point.idle_ns / 1e9, 1) for point in wake] == list(pauses)
    assert [point.extra_ns / 1e6 for point in wake] == pytest.approx([0, 10, 20, 30], abs=1)
    evaluation = evaluate(tmp_path / "pack", tmp_path / "other")
    assert evaluation.overall.mape < 2.0
    assert abs(evaluation.overall.bias) < 1.0


def test_stalls_of_the_host_and_steps_that_may_have_waited_are_not_its_time(tmp_path: Path) -> None:
    made = captures.steps(400)
    for at in range(0, 400, 5):
        made[at] = made[at]._replace(host_ns=30_000_000 if at % 10 else 0)
    captures.write_run(tmp_path, made)
    built = build_pack(BuildRequest(tmp_path, licence="CC0-1.0"), tmp_path / "pack")

    host = pack.check_pack(tmp_path / "pack").manifest.latency.host
    assert host == pack.HostTime(step_ns=captures.HOST_NS, request_ns=captures.HOST_NS_PER_REQUEST)
    assert "host 210 us + 1.50 us per request" in built.lines[1]


def test_a_pack_says_nothing_of_a_host_that_the_capture_does_not_know(tmp_path: Path) -> None:
    made = [step._replace(host_ns=step.host_ns if step.step_index < 31 else 0) for step in captures.steps(400)]
    captures.write_run(tmp_path, made)
    built = build_pack(BuildRequest(tmp_path, licence="CC0-1.0"), tmp_path / "pack")

    assert isinstance(pack.check_pack(tmp_path / "pack").manifest.latency.host, msgspec.UnsetType)
    assert "host not known" in built.lines[1]


def test_a_few_steps_after_a_pause_tell_nothing_of_waking(tmp_path: Path) -> None:
    captures.write_run(tmp_path, paused(captures.steps(400), (6.4,), 80))
    build_pack(BuildRequest(tmp_path, licence="CC0-1.0"), tmp_path / "pack")

    assert isinstance(pack.check_pack(tmp_path / "pack").manifest.latency.wake, msgspec.UnsetType)


def test_runs_of_two_configurations_make_no_pack(tmp_path: Path) -> None:
    captures.write_run(tmp_path, captures.steps(50))
    captures.write_run(tmp_path, captures.steps(50), number=2, engine={"max_num_seqs": 128, "block_size": 16})

    with pytest.raises(InvalidArgument, match="block_size is 128 and 16; max_num_seqs is 64 and 128"):
        build_pack(BuildRequest(tmp_path), tmp_path / "pack")


def test_a_resumed_capture_whose_engines_had_a_few_blocks_more_or_less_has_the_fewest(tmp_path: Path) -> None:
    """A GPU's free memory differs a little from start to start."""
    captures.write_run(tmp_path, captures.steps(60))
    captures.write_run(tmp_path, captures.steps(60, seed=2), number=2, engine={"num_kv_blocks": 675})
    built = build_pack(BuildRequest(tmp_path, "sampled"), tmp_path / "pack")

    assert pack.check_pack(tmp_path / "pack").manifest.kv_cache.blocks == 675
    assert "KV blocks: 675 of 128 tokens, measured (the fewest; the runs had 682, 675)" in built.lines[1]


def test_runs_whose_memory_was_another_make_no_pack(tmp_path: Path) -> None:
    captures.write_run(tmp_path, captures.steps(60))
    captures.write_run(tmp_path, captures.steps(60, seed=2), number=2, engine={"num_kv_blocks": 600})

    with pytest.raises(InvalidArgument, match="682, 600 KV blocks, more than 5 % apart"):
        build_pack(BuildRequest(tmp_path), tmp_path / "pack")


def test_what_lies_between_end_and_result_is_taken_where_the_devices_clock_has_not_drifted(tmp_path: Path) -> None:
    """One long stretch without an idle device, whose clock runs 100 ppm slow: 0.3 ms at its end."""
    made = captures.steps(400)
    begin = made[0].device_start_ns
    drifted = []
    for at, each in enumerate(made):
        away = (each.device_start_ns - begin) // 10_000
        drifted.append(
            each._replace(
                device_start_ns=each.device_start_ns + away, device_end_ns=each.device_end_ns + away, was_idle=at == 0
            )
        )
    captures.write_run(tmp_path, drifted)
    build_pack(BuildRequest(tmp_path, "sampled"), tmp_path / "pack")

    assert made[-1].device_start_ns - begin > 3 * 10**9, "long enough to drift"
    assert pack.check_pack(tmp_path / "pack").manifest.latency.copy_ns == pytest.approx(captures.COPY_NS, rel=0.5)


def test_a_run_without_the_files_of_every_rank_makes_no_pack(tmp_path: Path) -> None:
    captures.write_run(tmp_path, captures.steps(60), engine={"tensor_parallel_size": 2})

    with pytest.raises(InvalidArgument, match="files of 1 of 2 ranks"):
        build_pack(BuildRequest(tmp_path), tmp_path / "pack")


def test_the_manifest_says_how_graphs_were_captured(tmp_path: Path) -> None:
    run = captures.write_run(tmp_path, captures.steps(60))
    facts = json.loads((run / "engine.json").read_text())
    (run / "engine.json").write_text(json.dumps(facts | {"cudagraph_mode": "FULL_AND_PIECEWISE"}))
    build_pack(BuildRequest(tmp_path, "sampled"), tmp_path / "pack")

    assert pack.check_pack(tmp_path / "pack").manifest.provenance["cudagraph mode"] == "FULL_AND_PIECEWISE"


@pytest.mark.parametrize(
    ("request_fields", "engine", "message"),
    [
        ({"kind": "composed"}, {}, "hybrid, sampled"),
        ({"skip_steps": 1000}, {}, "no usable step"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, request_fields: dict[str, object], engine: dict[str, object], message: str
) -> None:
    captures.write_run(tmp_path, captures.steps(50), engine=engine)
    with pytest.raises(InvalidArgument, match=message):
        build_pack(BuildRequest(tmp_path, **request_fields), tmp_path / "pack")  # type: ignore[arg-type]


def test_a_pack_compared_with_itself_has_not_moved(built: Path) -> None:
    comparison = compare_packs(built, built)

    assert comparison.fields == {}
    assert {(region.change, region.effect, region.moved_share) for region in comparison.regions} == {(0, 0, 0)}


@pytest.mark.parametrize(("latency_ns", "effect"), [(12_000_000, math.inf), (8_000_000, -math.inf)])
def test_packs_that_do_not_scatter_differ_without_bound_in_the_direction_they_differ(
    tmp_path: Path, latency_ns: int, effect: float
) -> None:
    build_constant_pack(tmp_path / "a", latency_ns=10_000_000)
    build_constant_pack(tmp_path / "b", latency_ns=latency_ns)
    comparison = compare_packs(tmp_path / "a", tmp_path / "b")
    document = json.dumps(comparison.as_dict(), allow_nan=False)

    assert comparison.regions
    assert {region.effect for region in comparison.regions} == {effect}
    assert {region["effect"] for region in json.loads(document)["regions"]} == {None}


@pytest.mark.slow
def test_a_pack_of_a_slower_device_has_moved_everywhere(capture: Path, tmp_path: Path) -> None:
    captures.write_run(tmp_path / "slow", captures.steps(600, seed=4, factor=1.1), engine={"max_num_seqs": 32})
    build_pack(BuildRequest(capture), tmp_path / "a")
    build_pack(BuildRequest(tmp_path / "slow"), tmp_path / "b")
    comparison = compare_packs(tmp_path / "a", tmp_path / "b")

    assert comparison.fields == {"engine.max_num_seqs": ("64", "32")}
    assert comparison.regions
    for region in comparison.regions:
        assert region.change == pytest.approx(10, abs=2)
        assert region.effect > 3
        assert region.moved_share == 1


def test_a_table_has_every_step_and_a_unit_for_every_column(capture: Path, tmp_path: Path) -> None:
    runs = read_capture(capture)
    assert write_table(runs, tmp_path / "steps.parquet") == 600
    table = pq.read_table(tmp_path / "steps.parquet")
    row = table.slice(17, 1).to_pylist()[0]
    step = runs[0].steps[17]

    assert table.column_names == ["run", *COLUMNS]
    assert all(table.schema.field(name).metadata[b"unit"] for name in table.column_names)
    assert (row["run"], row["step_index"], row["latency_ns"]) == ("run-001", step.step_index, step.latency_ns)
    assert (row["prep_ns"], row["copy_ns"]) == (captures.PREP_NS, captures.COPY_NS)
    with pytest.raises(InvalidArgument, match="exists"):
        write_table(runs, tmp_path / "steps.parquet")


@pytest.mark.slow
def test_the_commands_do_all_of_it(capture: Path, held_out: Path, tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    assert "KV blocks: 682 of 128 tokens, measured" in step_oracle("build", str(capture), "-o", one)
    step_oracle("build", str(capture), "--kind", "sampled", "-o", other)
    told = json.loads(step_oracle("evaluate", one, "--on", str(held_out), "--json"))
    assert told["overall"]["steps"] == 300
    assert "in the pack" in step_oracle("evaluate", one, "--on", str(capture))
    assert "kind: hybrid in A, sampled in B" in step_oracle("pack", "compare", one, other)
    assert json.loads(step_oracle("pack", "compare", one, other, "--json"))["left_out"] >= 0
    for name in ("steps.parquet", "steps.csv"):
        assert "600 steps of 1 runs" in step_oracle("trace", "export", str(capture), "-o", str(tmp_path / name))
    fit = ("--device", "d", "--device-memory-gib", "24", "--kv-blocks", "682", "--block-size", "128")
    assert "steps: 600" in step_oracle("fit", str(tmp_path / "steps.csv"), *fit, "-o", str(tmp_path / "fitted"))


def _lognormal_share(value: float) -> float:
    """Share of a standard log-normal distribution below the value."""
    return 0.5 * (1 + math.erf(math.log(value) / math.sqrt(2)))
