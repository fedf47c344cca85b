"""Pictures and summaries of packs."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from oracle_server.pack import (
    ComposedLatency,
    Correction,
    Device,
    KvCache,
    Latency,
    Manifest,
    Model,
    Operator,
    SampledLatency,
    Uncertainty,
    write_pack,
)
from profiler.pack_summary import print_summary, summary_json
from profiler.surface import Surface, read_pack, surfaces_of
from profiler.surface_png import draw_surfaces

_CELLS = {(0, 1, 2): (5.0, 7.0, 9.0), (0, 8, 7): (8.0,), (1, 128, 2): (20.0,), (1, 512, 7): (40.0, 60.0)}


def _manifest(kind: str, latency: Latency) -> Manifest:
    return Manifest(
        name=f"a {kind} pack",
        kind="sampled" if kind == "sampled" else "composed",
        created="2026-01-02T03:04:05Z",
        licence="MIT",
        model=Model(id="m"),
        device=Device(name="Made GPU", memory_bytes=24 << 30),
        kv_cache=KvCache(blocks=100, block_size=16, basis="assumed", source="made for a test"),
        latency=latency,
        coverage={"decode_requests": 4, "context_tokens": 64, "chunk_tokens": 8, "history_tokens": 64},
        corrections=(Correction(name="skew", value=0.04, reason="uneven contexts", source="a test"),),
        uncertainty=Uncertainty(low_percent=-5, high_percent=10, basis="a guess"),
    )


@pytest.fixture
def sampled(tmp_path: Path) -> Path:
    rows = [(*cell, value) for cell, values in _CELLS.items() for value in values]
    write_pack(
        tmp_path / "sampled",
        _manifest("sampled", Latency(sampled=SampledLatency(concurrency_bucket_width=5))),
        samples={
            "table": [row[0] for row in rows],
            "total_tokens": [row[1] for row in rows],
            "concurrency": [row[2] for row in rows],
            "context_tokens": [-1] * len(rows),
            "previous_prefill_tokens": [-1] * len(rows),
            "latency_ns": [int(row[3] * 1e6) for row in rows],
        },
    )
    return tmp_path / "sampled"


@pytest.fixture
def composed(tmp_path: Path) -> Path:
    axes = {
        "dense_gemm": ("total_tokens",),
        "logits": ("logits_rows",),
        "generation_attention": ("decode_requests", "mean_context_tokens"),
        "context_attention": ("chunk_tokens", "history_tokens"),
    }
    operators = tuple(Operator(id=i, name=name, axes=names) for i, (name, names) in enumerate(axes.items()))
    # operator, x0, x1, ns: decode costs 1 ms + 1 us x requests x context, a chunk 1 ms + 2 us x chunk.
    rows = [(0, 1, 0, 1e6), (0, 64, 0, 1e6), (1, 1, 0, 0), (1, 64, 0, 0)]
    rows += [(2, n, kv, 1e3 * n * kv) for n in (1, 4) for kv in (0, 64)]
    rows += [(3, chunk, history, 2e3 * chunk) for chunk in (1, 8) for history in (0, 64)]
    columns = np.array(rows, dtype=np.float64).T
    write_pack(
        tmp_path / "composed",
        _manifest("composed", Latency(composed=ComposedLatency(operators=operators))),
        operators={
            "operator": columns[0].astype(np.int16),
            "x0": columns[1],
            "x1": columns[2],
            "x2": np.zeros(len(rows)),
            "x3": np.zeros(len(rows)),
            "latency_ns": columns[3],
            "knowledge": np.ones(len(rows), dtype=np.int8),
        },
        residuals={"ratio": [0.5, 1.5]},
    )
    return tmp_path / "composed"


def _surfaces(pack: Path) -> tuple[Surface, ...]:
    return surfaces_of(read_pack(pack)[1])


def _at(surface: Surface, y: int, x: int) -> float:
    return float(surface.latency_ms[surface.y.index(y), surface.x.index(x)])


def test_a_sampled_surface_shows_medians_and_leaves_holes(sampled: Path) -> None:
    decode, prefill = _surfaces(sampled)
    assert _at(decode, 2, 1) == 7.0
    assert _at(decode, 7, 8) == 8.0
    assert _at(prefill, 7, 512) == 50.0
    assert int(np.isfinite(decode.latency_ms).sum()) == 2
    assert int(np.isfinite(prefill.latency_ms).sum()) == 2


def test_patches_are_pooled_where_there_is_no_room(sampled: Path) -> None:
    decode, _ = surfaces_of(read_pack(sampled)[1], most_rows=1, most_columns=2)
    assert len(decode.x) == 2
    assert decode.latency_ms.size < _surfaces(sampled)[0].latency_ms.size


def test_a_composed_surface_is_the_model_without_its_scatter(composed: Path) -> None:
    decode, prefill = _surfaces(composed)
    assert _at(decode, 4, 64) == pytest.approx(1.256)
    assert _at(decode, 1, 32) == pytest.approx(1.032)
    assert _at(prefill, 8, 0) == pytest.approx(1.016)


def test_the_summary_says_what_how_and_how_far(composed: Path) -> None:
    report, compiled = read_pack(composed)
    console = Console(file=io.StringIO(), width=100, markup=False)
    print_summary(console, report, surfaces_of(compiled, per_octave=1))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in (
        "a composed pack",
        "Made GPU",
        "100 KV blocks of 16 (1,600 tokens), assumed: made for a test",
        "uneven contexts",
        "Truth lies -5 to +10 % from the answers (a guess)",
        "Decode step, ms",
    ):
        assert part in text


def test_words_of_a_pack_neither_style_nor_steer_the_terminal(composed: Path) -> None:
    report, _ = read_pack(composed)
    manifest = msgspec.structs.replace(report.manifest, name="[red]\x1b[2J$\\frac$", provenance={"a": "b\nc [/x]"})
    console = Console(file=io.StringIO(), width=100, markup=False)
    print_summary(console, dataclasses.replace(report, manifest=manifest), ())
    assert isinstance(console.file, io.StringIO)
    assert "[red]?[2J" in console.file.getvalue()
    assert "b?c [/x]" in console.file.getvalue()
    assert "\x1b" not in console.file.getvalue()


def test_holes_are_dots_on_the_terminal_and_null_in_json(sampled: Path) -> None:
    report, compiled = read_pack(sampled)
    console = Console(file=io.StringIO(), width=100, markup=False)
    print_summary(console, report, surfaces_of(compiled))
    assert isinstance(console.file, io.StringIO)
    assert "· no sample" in console.file.getvalue()
    document = json.loads(json.dumps(summary_json(report, surfaces_of(compiled)), allow_nan=False))
    assert document["digest"] == report.digest
    assert document["manifest"]["kv_cache"]["blocks"] == 100
    assert None in document["surfaces"][0]["latency_ms"][0]


def test_the_picture_is_a_png(sampled: Path, tmp_path: Path) -> None:
    draw_surfaces(_surfaces(sampled), tmp_path / "a.png", title="$\\frac$", subtitle="s", footer="f")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
