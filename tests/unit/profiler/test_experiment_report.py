"""Arms of an experiment: a known difference is found, none is not, and the intervals hold what they promise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench_results import bench_result, write_result
from oracle_server.cli.attached import Fleet, FleetEngine
from oracle_server.errors import InvalidArgument
from profiler.experiment_report import intervals
from profiler.experiment_report.arms import Arm, arms_of, read_results
from profiler.experiment_report.intervals import (
    LEAST_ENGINES,
    METRICS,
    Metric,
    clusters_of,
    difference,
    estimate,
)
from profiler.experiment_report.picture import draw_report
from profiler.experiment_report.report import as_json, build_report, tables
from profiler.experiment_report.runs import EngineRun, read_run, run_of

TPOT = next(metric for metric in METRICS if metric.name == "TPOT mean")
RATE = next(metric for metric in METRICS if metric.of == "tokens")


def engine(engine_id: str, pack: str = "a", **fields: Any) -> FleetEngine:
    values: dict[str, Any] = {
        "pack_digest": f"sha256:{pack * 64}",
        "pack_name": f"pack-{pack}",
        "labels": {},
        "steps": 1000,
        "extrapolated_steps": 10,
        "leased_steps": 0,
        "late_answers": 0,
        "overlays": (),
    }
    return FleetEngine(engine_id, **(values | fields))


def runs_of(folder: Path, seeds: range, **options: Any) -> list[EngineRun]:
    return [read_run(f"e{seed}", write_result(folder / f"{seed}.json", seed, **options)) for seed in seeds]


def test_latencies_are_those_vllm_states(tmp_path: Path) -> None:
    document = bench_result(3, requests=50)
    document["output_lens"][7], document["latencies"][7] = 1, document["ttfts"][7]
    # As a failed request is written.
    document["output_lens"][9], document["ttfts"][9], document["latencies"][9] = 0, 0.0, 0.0
    (tmp_path / "r.json").write_text(json.dumps(document))
    run = read_run("e", tmp_path / "r.json")
    kept = [i for i in range(50) if i != 9]
    tpots = [
        1e3 * (document["latencies"][i] - document["ttfts"][i]) / (document["output_lens"][i] - 1)
        for i in kept
        if i != 7
    ]
    whole = run.whole()
    assert (run.failed, len(whole.ttft), len(whole.tpot)) == (1, 49, 48)
    assert whole.tpot == pytest.approx(tpots)
    assert whole.ttft == pytest.approx([1e3 * document["ttfts"][i] for i in kept])
    assert whole.tokens / whole.seconds == pytest.approx(sum(document["output_lens"]) / document["duration"])


def test_a_file_without_latencies_and_start_times_says_almost_the_same(tmp_path: Path) -> None:
    document = bench_result(4)
    full = read_run("e", write_result(tmp_path / "full.json", 4)).whole()
    for name in ("latencies", "start_times"):
        del document[name]
    (tmp_path / "old.json").write_text(json.dumps(document))
    old = read_run("e", tmp_path / "old.json").whole()
    assert old.tpot == pytest.approx(full.tpot)
    assert old.seconds == full.seconds


def test_stretches_of_a_run_add_up_to_it(tmp_path: Path) -> None:
    run = read_run("e", write_result(tmp_path / "r.json", 5, requests=203))
    blocks, whole = run.blocks(20), run.whole()
    assert len(blocks) == 20
    assert np.concatenate([block.ttft for block in blocks]).tolist() == whole.ttft.tolist()
    assert sum(block.tokens for block in blocks) == whole.tokens
    assert sum(block.seconds for block in blocks) == pytest.approx(whole.seconds)
    assert len(read_run("e", write_result(tmp_path / "s.json", 5, requests=3)).blocks(20)) == 3


def test_the_figures_are_the_obvious_ones(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, range(6))
    (clusters,), _ = clusters_of([runs])
    values = {metric.name: estimate(clusters, metric, resamples=50).value for metric in METRICS}
    ttft = np.concatenate([run.whole().ttft for run in runs])
    assert values["TTFT p99"] == pytest.approx(np.percentile(ttft, 99))
    assert values["TTFT mean"] == pytest.approx(ttft.mean())
    tokens, seconds = sum(run.tokens.sum() for run in runs), sum(run.seconds for run in runs)
    assert values[RATE.name] == pytest.approx(tokens / seconds)


@pytest.mark.parametrize(("engines", "resampled"), [(8, "engines"), (1, "stretches of consecutive requests")])
def test_a_difference_of_ten_percent_is_found_and_none_is_not(engines: int, resampled: str, tmp_path: Path) -> None:
    spread = 0.02 if engines > 1 else 0.0
    before = runs_of(tmp_path, range(engines), engine_spread=spread)
    same = runs_of(tmp_path, range(100, 100 + engines), engine_spread=spread)
    slower = runs_of(tmp_path, range(200, 200 + engines), engine_spread=spread, tpot_ms=22.0)
    clusters, how = clusters_of([before, same, slower])
    assert how == resampled
    found = difference(clusters[0], clusters[2], TPOT)
    print(f"{engines} engines per arm: 10 % slower: {found.value:+.2f} % ({found.low:+.2f} to {found.high:+.2f})")
    assert 0 < found.low < 10 < found.high < 20
    nothing = difference(clusters[0], clusters[1], TPOT)
    print(f"{engines} engines per arm: nothing: {nothing.value:+.2f} % ({nothing.low:+.2f} to {nothing.high:+.2f})")
    assert nothing.low < 0 < nothing.high


@pytest.mark.slow
@pytest.mark.parametrize(("engines", "requests"), [(5, 40), (1, 400)])
def test_intervals_hold_the_truth_as_often_as_they_promise(engines: int, requests: int) -> None:
    """200 experiments of a true +10 %. At 95 % fewer than 181 hold it with a probability of 0.4 %."""
    held = 0
    for experiment in range(200):
        first = 1000 * experiment
        spread = 0.05 if engines > 1 else 0.0
        options: dict[str, Any] = {"requests": requests, "engine_spread": spread}
        before = [run_of("e", bench_result(first + i, **options)) for i in range(engines)]
        slower = [run_of("e", bench_result(first + 500 + i, tpot_ms=22.0, **options)) for i in range(engines)]
        (one, other), _ = clusters_of([before, slower])
        found = difference(one, other, TPOT, resamples=1000, seed=experiment)
        # What the interval is of: the ratio of the engines' expected values.
        held += found.low <= 10 <= found.high
    print(f"{engines} engines per arm: {held} of 200 intervals hold the truth")
    assert held >= 181


def test_too_few_engines_in_one_arm_make_all_arms_resample_stretches(tmp_path: Path) -> None:
    many, few = runs_of(tmp_path, range(LEAST_ENGINES)), runs_of(tmp_path, range(20, 22))
    clusters, how = clusters_of([many, few])
    assert how == "stretches of consecutive requests"
    assert [len(each) for each in clusters] == [100, 40]


def test_one_request_has_a_figure_and_no_interval(tmp_path: Path) -> None:
    (clusters,), _ = clusters_of([runs_of(tmp_path, range(1), requests=1)])
    found = estimate(clusters, TPOT)
    assert found.value > 0
    assert math.isnan(found.low)


def test_arms_are_made_by_pack_label_overlay_and_engine(tmp_path: Path) -> None:
    fleet = Fleet(
        "tenants/default/experiments/e",
        4,
        (
            engine("one/dp0", labels={"rack": "7"}),
            engine("one/dp1", labels={"rack": "7"}),
            engine("two", "b", labels={"rack": "7"}, overlays=(0, 2)),
            engine("three", "b"),
            engine("four", "b"),
        ),
    )
    runs = read_results([f"{name}={write_result(tmp_path / name, 1)}" for name in ("two", "one", "three")])

    def grouped(by: str, baseline: str | None = None) -> list[tuple[str, list[str]]]:
        return [(arm.name, [e.engine_id for e in arm.engines]) for arm in arms_of(fleet, runs, by, baseline)]

    assert grouped("pack") == [("pack-b (bbbbbbbb)", ["two", "three"]), ("pack-a (aaaaaaaa)", ["one/dp0", "one/dp1"])]
    assert grouped("pack", "pack-a")[0][0] == "pack-a (aaaaaaaa)"
    assert grouped("label.rack") == [("rack=7", ["two", "one/dp0", "one/dp1"]), ("no label rack", ["three"])]
    assert [name for name, _ in grouped("overlays")] == ["overlays 0, 2", "no overlay"]
    assert [name for name, _ in grouped("engine")] == ["two", "one", "three"]
    report = build_report(fleet, arms_of(fleet, runs, "pack"), "pack", resamples=50)
    assert report.left_out == ("four",)
    for by, baseline, says in (("rack", None, "label.KEY"), ("pack", "pack", "2 arms"), ("pack", "x", "0 arms")):
        with pytest.raises(InvalidArgument, match=says):
            grouped(by, baseline)
    with pytest.raises(InvalidArgument, match="'five', which is not attached"):
        arms_of(fleet, {"five": runs["one"]}, "pack")


BAD = {
    "no name": ("=file", "ENGINE_ID=FILE"),
    "no file": ("e", "ENGINE_ID=FILE"),
    "a file that is not there": ("e=/nowhere", "/nowhere cannot be read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_results_that_cannot_be_read_are_refused(fault: str) -> None:
    word, says = BAD[fault]
    with pytest.raises(InvalidArgument, match=says):
        read_results([word])


@pytest.mark.parametrize(
    "change",
    [
        {"ttfts": None},
        {"ttfts": [0.1]},
        {"duration": 0},
        {"duration": "x"},
        {"output_lens": [0] * 200},
        {"latencies": ["x"] * 200},
    ],
)
def test_a_file_that_is_no_detailed_result_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(bench_result(1) | change))
    with pytest.raises(InvalidArgument, match="--save-detailed"):
        read_run("e", tmp_path / "r.json")
    with pytest.raises(InvalidArgument, match="twice"):
        read_results([f"e={write_result(tmp_path / 'good.json', 1)}"] * 2)


def report_of(folder: Path, arms: int) -> Any:
    engines: list[FleetEngine] = []
    made: list[Arm] = []
    for number in range(arms):
        pack = "abc"[number]
        fleet_engines = tuple(engine(f"{pack}{i}", pack, extrapolated_steps=number) for i in range(6))
        seeds = range(10 * number, 10 * number + 6)
        runs = runs_of(folder, seeds, tpot_ms=20 * (1 + 0.1 * number), ttft_ms=60 + 20 * number)
        engines += fleet_engines
        made.append(Arm(f"pack-{pack}", fleet_engines, tuple(runs)))
    fleet = Fleet("tenants/default/experiments/e", 3, tuple(engines))
    return build_report(fleet, made, "pack", resamples=200)


@pytest.mark.parametrize("arms", [1, 2, 3])
def test_a_report_is_data_tables_and_a_picture(arms: int, tmp_path: Path) -> None:
    report = report_of(tmp_path, arms)
    document = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert [arm["steps"] for arm in document["arms"]] == [6000] * arms
    assert document["arms"][-1]["extrapolated_share"] == pytest.approx((arms - 1) / 1000)
    assert document["resampled"] == "engines"
    assert not document["arms"][0]["differences_percent"]
    if arms == 3:
        found = document["arms"][2]["differences_percent"]["TPOT mean"]
        assert found["low"] < 20 < found["high"]
    found_tables = tables(report)
    assert len(found_tables) == min(arms, 2)
    assert {len(row) for _, rows in found_tables[:1] for row in rows} == {arms + 1}
    draw_report(report, tmp_path / "report.png")
    data = (tmp_path / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 20_000


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: str(metric.name))
@pytest.mark.parametrize("requests", [1, 9, 40, 500])
def test_a_figure_of_many_resamples_is_that_of_each(metric: Metric, requests: int, tmp_path: Path) -> None:
    clusters = [*runs_of(tmp_path, range(1, 2), requests=requests)[0].blocks(9)]
    # One whose requests had one token each, and two with equal latencies.
    clusters += [replace(clusters[0], tpot=np.empty(0)), replace(clusters[0], ttft=np.full(5, 60.0))]
    clusters.append(clusters[-1])
    taken = np.random.default_rng(1).integers(0, len(clusters), (200, len(clusters)))
    # Nothing but clusters without a TPOT.
    taken[0] = len(clusters) - 3
    with_gaps = intervals._statistic(clusters, metric)(taken)
    for row, found in zip(taken, with_gaps, strict=True):
        mine = [clusters[i] for i in row]
        if metric.of == "tokens":
            wanted = sum(each.tokens for each in mine) / sum(each.seconds for each in mine)
        else:
            pooled = np.concatenate([getattr(each, metric.of) for each in mine])
            if not pooled.size:
                wanted = math.nan
            elif metric.percentile is None:
                wanted = pooled.mean()
            else:
                wanted = np.percentile(pooled, metric.percentile)
        assert found == pytest.approx(wanted, rel=1e-12, nan_ok=True)
    assert math.isnan(with_gaps[0]) == (metric.of == "tpot")
