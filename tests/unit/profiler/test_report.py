"""The report: what it holds, that it needs nothing else, and what its pictures show."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import captures
from builders import build_composed_pack, build_constant_pack, build_sampled_pack
from oracle_server.pack import compile_pack, load_compiled
from profiler.cli import main
from profiler.report.figures import cdf_figure, coverage_figure, error_figure, plan_figure, tail_figure
from profiler.report.judged import JudgedSteps, judge, region_errors
from profiler.report.measurements import compare, read_measurement
from profiler.report.page import Section, Table, render
from profiler.report.perfetto import DrawnStep, perfetto
from profiler.report.plan_progress import read_plans
from profiler.surface import read_pack
from step_oracle.v1 import step_pb2, trace_pb2

_PNG = b"\x89PNG\r\n\x1a\n"


class _Addresses(html.parser.HTMLParser):
    """Everything a browser would fetch or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def _steps_file(path: Path, rows: Sequence[tuple[int, int, int]]) -> Path:
    """Decode steps: (requests, context tokens in all, latency in ns)."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["num_decode_requests", "decode_context_tokens", "latency_ns"])
        writer.writerows(rows)
    return path


def _bench(path: Path, *, scale: float = 1.0, requests: int = 20) -> Path:
    """A result of `vllm bench serve --save-detailed`: seconds, and a failed request in the middle."""
    ttfts = [0.1 * scale * (1 + number / requests) for number in range(requests)]
    itls = [[0.02 * scale] * 9 for _ in range(requests)]
    lengths = [10] * requests
    ttfts[requests // 2], itls[requests // 2], lengths[requests // 2] = 0.0, [], 0
    path.write_text(
        json.dumps({"ttfts": ttfts, "itls": itls, "output_lens": lengths, "output_throughput": 100.0 / scale})
    )
    return path


def _judged(tmp_path: Path, rows: Sequence[tuple[int, int, int]], latency_ns: int = 10_000_000) -> JudgedSteps:
    build_constant_pack(tmp_path / "pack", latency_ns=latency_ns)
    _, compiled = read_pack(tmp_path / "pack")
    return judge(compiled, _steps_file(tmp_path / "steps.csv", rows))


def test_the_page_needs_nothing_but_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_composed_pack(tmp_path / "pack", ratios=[0.9, 1.0, 1.1])
    steps = _steps_file(tmp_path / "steps.csv", [(n, n * 100, 5_000_000 + n) for n in range(1, 40)])
    real, emulated = _bench(tmp_path / "real.json"), _bench(tmp_path / "emulated.json", scale=1.1)

    status = main(
        [
            *("report", str(tmp_path / "pack"), "--on", str(steps), "--real", str(real), "--emulated", str(emulated)),
            *("-o", str(tmp_path / "report.html"), "--png", str(tmp_path / "png")),
        ]
    )

    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    addresses = _Addresses()
    addresses.feed(page)
    pictures = [address for address in addresses.found if address.startswith("data:image/png;base64,")]
    assert status == 0
    assert [address for address in addresses.found if address not in pictures and not address.startswith("#")] == []
    assert not re.search(r"https?:|@import|url\(|<script|<link", re.sub(r"base64,[\w+/=]+", "", page))
    names = ["surfaces", "coverage", "errors", "tails", "requests"]
    assert capsys.readouterr().out.splitlines()[1:] == [str(tmp_path / "png" / f"{name}.png") for name in names]
    embedded = [base64.b64decode(picture.partition(",")[2]) for picture in pictures]
    assert embedded == [(tmp_path / "png" / f"{name}.png").read_bytes() for name in names]
    assert all(picture.startswith(_PNG) for picture in embedded)


def test_a_sampled_pack_has_a_page(tmp_path: Path) -> None:
    build_sampled_pack(tmp_path / "pack")

    assert main(["report", str(tmp_path / "pack"), "-o", str(tmp_path / "report.html")]) == 0
    assert "cells without a sample" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_words_of_a_pack_are_escaped() -> None:
    table = Table(("a",), (("<b>",),))

    page = render("<script>", [("<i>", "x & y")], [Section("s", "<u>", "<p>", table=table)])

    assert "<script>" not in page
    assert [word in page for word in ("<i>", "<b>", "<u>")] == [False] * 3
    assert "x &amp; y" in page


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "give a PACK"),
        (["--on", "x.csv", "--real", "a", "--emulated", "b"], "--on judges a pack"),
        (["--real", "a"], "give both or neither"),
    ],
)
def test_wrong_arguments_say_what_to_give(
    tmp_path: Path, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments, "-o", str(tmp_path / "report.html")]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_errors_of_regions_are_those_of_their_steps(tmp_path: Path) -> None:
    # The pack says 10 ms to all. Two requests: measured 8 and 12.5 ms; forty: measured 20 ms.
    judged = _judged(tmp_path, [(2, 200, 8_000_000), (2, 200, 12_500_000), (40, 4000, 20_000_000)])

    everything, few, many = region_errors(judged)

    assert (everything.region, few.region, many.region) == (
        "all steps",
        "decode, 2-4 requests, 1-256 context",
        "decode, 17-64 requests, 1-256 context",
    )
    assert (few.steps, many.steps) == (2, 1)
    assert few.mape == pytest.approx((25 + 20) / 2)
    assert few.bias == pytest.approx(100 * (20 / 20.5 - 1))
    assert (many.bias, many.low, many.high) == pytest.approx((-50, -50, -50))


def test_a_long_file_is_judged_on_evenly_spread_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiler.report.judged.MOST_STEPS", 5)

    judged = _judged(tmp_path, [(n, n * 10, 1_000_000 * n) for n in range(1, 102)])

    assert judged.steps_in_file == 101
    assert judged.truth_ns.tolist() == [1e6, 26e6, 51e6, 76e6, 101e6]


def test_the_error_figure_holds_a_dot_per_region_and_an_arrow_beyond_the_edge(tmp_path: Path) -> None:
    rows = [(2, 200, 9_900_000 + 20_000 * n) for n in range(12)] + [(40, 4000, 40_000_000)]
    judged = _judged(tmp_path, rows)
    errors = region_errors(judged)

    axes = error_figure(errors).axes[0]

    dots = [line for line in axes.lines if line.get_marker() in ("o", "<", ">")]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [error.region for error in errors]
    assert [dot.get_marker() for dot in dots] == ["o", "o", "<"]
    assert float(np.ravel(dots[1].get_xdata())[0]) == pytest.approx(errors[1].bias)
    assert float(np.ravel(dots[2].get_xdata())[0]) == pytest.approx(axes.get_xlim()[0])


def test_the_tail_figure_holds_every_measured_ratio(tmp_path: Path) -> None:
    judged = _judged(tmp_path, [(2, 200, 10_000_000), (2, 200, 15_000_000), (2, 200, 8_000_000)])

    measured, drawn = tail_figure(judged).axes[0].lines[:2]

    assert np.asarray(measured.get_xdata()).tolist() == pytest.approx([0.8, 1.0, 1.5])
    assert np.asarray(measured.get_ydata()).tolist() == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert set(np.asarray(drawn.get_xdata()).tolist()) == {1.0}


def test_the_coverage_figure_holds_every_step_once(tmp_path: Path) -> None:
    judged = _judged(tmp_path, [(4, 400, 10_000_000), (8, 1600, 10_000_000)])

    decode, prefill = coverage_figure(judged).axes

    points = [tuple(point) for group in decode.collections for point in np.asarray(group.get_offsets())]
    assert sorted(points) == [(100.0, 4.0), (200.0, 8.0)]
    assert [text.get_text() for text in prefill.texts] == ["no such step"]


def test_a_bench_result_gives_latencies_of_the_requests_that_succeeded(tmp_path: Path) -> None:
    measured = read_measurement(_bench(tmp_path / "real.json"))

    assert {name: len(values) for name, values in measured.values.items()} == {
        "ttft": 19,
        "tpot": 19,
        "itl": 19 * 9,
        "e2e": 19,
    }
    assert measured.values["ttft"][0] == pytest.approx(100.0)
    assert measured.values["tpot"][0] == pytest.approx(20.0)
    assert measured.values["e2e"][0] == pytest.approx(100.0 + 180.0)


def test_a_replay_gives_latencies_of_all_its_runs(tmp_path: Path) -> None:
    request = {"arrival_ns": 0, "first_token_ns": 50_000_000, "last_token_ns": 250_000_000, "output_tokens": 11}
    run: dict[str, Any] = {"requests": [request, {**request, "output_tokens": 1}], "output_tokens_per_second": 48.0}
    (tmp_path / "replay.json").write_text(json.dumps({"schema": "step_oracle.replay/1", "runs": [run, run]}))

    replayed = read_measurement(tmp_path / "replay.json")

    assert {name: values.tolist() for name, values in replayed.values.items()} == {
        "ttft": [50.0] * 4,
        "tpot": [20.0] * 2,
        "e2e": [250.0] * 4,
    }


def test_two_measurements_are_compared_statistic_by_statistic(tmp_path: Path) -> None:
    real, emulated = (read_measurement(_bench(tmp_path / f"{scale}.json", scale=scale)) for scale in (1.0, 1.05))

    rows = {(row.metric, row.statistic): row.error_percent for row in compare(real, emulated)}

    assert len(rows) == 4 * 4 + 1
    assert rows["itl", "p99"] == pytest.approx(5.0)
    assert rows["output tokens/s", "mean"] == pytest.approx(100 * (1 / 1.05 - 1))


def test_the_overlay_holds_both_distributions(tmp_path: Path) -> None:
    real, emulated = (read_measurement(_bench(tmp_path / f"{scale}.json", scale=scale)) for scale in (1.0, 2.0))

    panels = cdf_figure(real, emulated).axes

    assert [axes.get_title() for axes in panels] == ["TTFT", "TPOT", "ITL", "E2E"]
    first, second = panels[0].lines[:2]
    assert np.asarray(first.get_xdata()).tolist() == pytest.approx(sorted(real.values["ttft"]))
    assert np.asarray(second.get_xdata()).tolist() == pytest.approx(sorted(emulated.values["ttft"]))
    assert np.asarray(first.get_ydata())[-1] == 1.0


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"ttfts": [1], "itls": []}'])
def test_a_file_that_is_no_measurement_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(text)
    file = str(tmp_path / "x.json")

    assert main(["report", "--real", file, "--emulated", file, "-o", str(tmp_path / "report.html")]) == 2
    assert "x.json" in capsys.readouterr().err


def _trace(path: Path, steps: int, engine: str = "e0") -> Path:
    """Steps of 10 ms dispatched 9 ms apart: each waits for the device; results are late by their number in us."""
    header = trace_pb2.TraceHeader()
    header.engine.engine_id = engine
    records = [trace_pb2.TraceRecord(header=header)]
    free = 0
    for number in range(steps):
        dispatch = 1_000_000 + number * 9_000_000
        start = max(dispatch, free)
        free = start + 10_000_000
        request = step_pb2.StepRequest(step_index=number, shape=step_pb2.StepShape(num_decode_requests=number + 1))
        if number == 0:
            request.shape.prefill_chunks.add(num_tokens=64)
        step = trace_pb2.TraceStep(
            request=request,
            reply=step_pb2.StepReply(latency_ns=[10_000_000], support=step_pb2.SUPPORT_EXACT),
            dispatch_ns=dispatch,
            device_start_ns=start,
            device_finish_ns=free,
            deadline_ns=free,
            answer_ns=dispatch + 300_000,
            resolved_ns=free + 1000 * number,
        )
        records.append(trace_pb2.TraceRecord(step=step))
    data = [record.SerializeToString() for record in records]
    path.write_bytes(b"".join(struct.pack("<I", len(each)) + each for each in data))
    return path


def test_steps_of_one_device_do_not_overlap_and_say_how_late_they_were(tmp_path: Path) -> None:
    traces = [_trace(tmp_path / f"{name}.trace", steps=20, engine=name) for name in ("e0", "e1")]

    assert main(["trace", "perfetto", *map(str, traces), "-o", str(tmp_path / "run.json")]) == 0

    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "b", "e", "C"}
    for process in (1, 2):
        device = [event for event in events if event["ph"] == "X" and event["pid"] == process]
        ends = [event["ts"] + event["dur"] for event in device]
        assert len(device) == 20
        assert all(end <= after["ts"] for end, after in zip(ends[:-1], device[1:], strict=True))
        assert [event["args"]["lateness_us"] for event in device] == [float(number) for number in range(20)]
        assert [event["name"] for event in device[:2]] == ["mixed", "decode"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["engine e0", "engine e1"]


def test_every_begin_has_its_end_and_no_time_is_before_the_first_dispatch(tmp_path: Path) -> None:
    main(["trace", "perfetto", str(_trace(tmp_path / "e.trace", steps=5)), "-o", str(tmp_path / "run.json")])

    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    pairs: dict[tuple[Any, ...], list[float]] = {}
    for event in events:
        if event["ph"] in "be":
            pairs.setdefault((event["pid"], event["cat"], event["id"]), []).append(event["ts"])
    assert len(pairs) == 10
    assert all(begin <= end for begin, end in pairs.values())
    assert min(event["ts"] for event in events if "ts" in event) == 0.0


def test_a_run_without_deadlines_has_no_lateness() -> None:
    step = DrawnStep(0, 100, 200, 1200, 1500, None, None, 3, 0, "measured")

    events = perfetto([("real", [step])])["traceEvents"]

    assert [event["name"] for event in events if event["ph"] == "C"] == ["decode requests", "prefill tokens"]
    assert [event["dur"] for event in events if event["ph"] == "X"] == [1.0]


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.trace").write_bytes(b"nothing")

    assert main(["trace", "perfetto", str(tmp_path / "x.trace"), "-o", str(tmp_path / "run.json")]) == 2
    assert "x.trace" in capsys.readouterr().err


def test_the_page_says_whether_the_pack_was_made_of_the_steps_it_is_judged_on(tmp_path: Path) -> None:
    steps = _steps_file(tmp_path / "steps.csv", [(2, 200, 10_000_000)])
    digest = hashlib.sha256(steps.read_bytes()).hexdigest()
    build_constant_pack(tmp_path / "own", provenance={"samples sha256": digest})
    build_constant_pack(tmp_path / "other")

    for name, made_of in (("own", True), ("other", False)):
        page = tmp_path / f"{name}.html"
        assert main(["report", str(tmp_path / name), "--on", str(steps), "-o", str(page)]) == 0
        assert ("The pack was made of these steps" in page.read_text(encoding="utf-8")) == made_of


def test_of_a_capture_only_runs_the_pack_was_not_made_of_are_judged_where_there_are_any(tmp_path: Path) -> None:
    first = captures.write_run(tmp_path / "capture", captures.steps(40))
    digest = hashlib.sha256((first / "engine.capture").read_bytes()).hexdigest()
    build_constant_pack(tmp_path / "pack", provenance={"run 1": f"run-001 sha256 {digest}"})
    _, compiled = read_pack(tmp_path / "pack")
    alone = judge(compiled, tmp_path / "capture")
    captures.write_run(tmp_path / "capture", captures.steps(25, seed=2), number=2)
    both = judge(compiled, tmp_path / "capture")

    assert (alone.is_made_of, alone.left_out, alone.steps_in_file) == (True, (), 40)
    assert (both.is_made_of, both.left_out, both.steps_in_file) == (False, ("run-001",), 25)


def test_what_a_pause_costs_counts_in_the_expected_latency_of_captured_steps(tmp_path: Path) -> None:
    first, second = captures.steps(2)
    late = {name: getattr(second, name) + 10**9 for name in ("dispatch_ns", "device_start_ns", "device_end_ns")}
    captures.write_run(tmp_path / "capture", [first, second._replace(**late, result_ns=second.result_ns + 10**9)])
    build_constant_pack(tmp_path / "pack", wake=[(500_000_000, 7_000_000)])
    compile_pack(tmp_path / "pack", tmp_path / "compiled")

    judged = judge(load_compiled(tmp_path / "compiled"), tmp_path / "capture")

    assert judged.expected_ns.tolist() == [10_000_000, 17_000_000]


def test_a_capture_has_a_page_and_a_timeline(tmp_path: Path) -> None:
    """The whole commands, on a capture with two runs of which the pack knows one."""
    first = captures.write_run(tmp_path / "capture", captures.steps(40))
    captures.write_run(tmp_path / "capture", captures.steps(25, seed=2), number=2)
    digest = hashlib.sha256((first / "engine.capture").read_bytes()).hexdigest()
    build_constant_pack(tmp_path / "pack", provenance={"run 1": f"run-001 sha256 {digest}"})
    page, timeline = tmp_path / "report.html", tmp_path / "run.json"

    assert main(["report", str(tmp_path / "pack"), "--on", str(tmp_path / "capture"), "-o", str(page)]) == 0
    assert "Left out, since it was made of them: run-001." in page.read_text(encoding="utf-8")
    assert main(["trace", "perfetto", str(tmp_path / "capture"), "-o", str(timeline)]) == 0
    events = json.loads(timeline.read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(slices) == 65
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        *("engine run-001", "engine run-002")
    }
    assert slices[0]["dur"] == pytest.approx(captures.steps(1)[0].latency_ns / 1e3)


def _plan_file(run: Path, *, known: int, visits: Sequence[tuple[str, int, int]], ends: bool = True) -> None:
    """Events as the driver of a plan writes them, a minute per visit: (region, regions tight, regions measured)."""
    events: list[dict[str, Any]] = [
        {"event": "plan begins", "monotonic_ns": 0, "regions": 5, "known": known, "measured": known, "minutes": 9.0},
        {"event": "warm-up begins", "monotonic_ns": 1},
        {"event": "warm-up ends", "monotonic_ns": 2},
        {"event": "left out", "monotonic_ns": 3, "visit": "decode 9 x 9", "reason": "refused: <too long>"},
    ]
    for number, (visit, tight, measured) in enumerate(visits, start=1):
        regions = {"regions_tight": tight, "regions_measured": measured}
        events.append({"event": "visit ends", "monotonic_ns": 60e9 * number, "visit": visit, **regions})
    if ends:
        events.append({"event": "plan ends", "monotonic_ns": 60e9 * 3, "tight": 4, "measured": 5, "regions": 5})
    (run / "plan.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "visi')


def test_the_progress_of_a_plan_is_read_run_by_run(tmp_path: Path) -> None:
    _plan_file(captures.write_run(tmp_path, []), known=0, visits=[("a", 0, 0), ("b", 1, 3)], ends=False)
    _plan_file(captures.write_run(tmp_path, [], number=2), known=1, visits=[("a", 1, 2), ("a", 3, 4)])
    captures.write_run(tmp_path, [], number=3)
    first, second = read_plans(tmp_path)

    assert [(round(minutes), tight, measured) for minutes, tight, measured in first.points] == [
        *((0, 0, 0), (1, 0, 0), (2, 1, 3))
    ]
    assert [(round(minutes), tight, measured) for minutes, tight, measured in second.points] == [
        *((0, 1, 1), (1, 1, 2), (2, 3, 4), (3, 4, 5))
    ]
    assert (first.ended, first.visits, second.ended, second.run) == (False, 2, True, "run-002")
    assert first.left_out == {"decode 9 x 9": "refused: <too long>"}


def test_the_plan_figure_puts_runs_one_behind_the_other(tmp_path: Path) -> None:
    for number in (1, 2):
        _plan_file(captures.write_run(tmp_path, [], number=number), known=number - 1, visits=[("a", 1, 1)])
    (axes,) = plan_figure(read_plans(tmp_path)).axes
    places = [np.asarray(line.get_xdata()) for line in axes.lines]
    ends = [float(place[-1]) for place in places if len(place) > 2]

    assert ends == pytest.approx([3.0, 3.0, 6.0, 6.0])


def test_a_capture_that_a_plan_drove_has_its_progress_on_the_page(tmp_path: Path) -> None:
    run = captures.write_run(tmp_path / "capture", captures.steps(40))
    _plan_file(run, known=0, visits=[("a", 1, 1)])
    build_constant_pack(tmp_path / "pack")
    page, png = tmp_path / "report.html", tmp_path / "png"
    arguments = ["--on", str(tmp_path / "capture"), "-o", str(page), "--png", str(png)]

    assert main(["report", str(tmp_path / "pack"), *arguments]) == 0
    assert "Capture plan" in page.read_text(encoding="utf-8")
    assert "refused: &lt;too long&gt;" in page.read_text(encoding="utf-8")
    assert (png / "plan.png").read_bytes().startswith(_PNG)
