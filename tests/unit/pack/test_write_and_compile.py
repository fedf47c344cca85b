"""Packs and compiled packs appear whole or not at all, and what was written is what is mapped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from builders import (
    build_composed_pack,
    build_constant_pack,
    build_sampled_pack,
    decode_query,
    mixed_query,
    plausible_operators,
    plausible_samples,
)
from naive import composed_answer, ranked_answer, sampled_answer
from oracle_server.errors import InvalidArgument, PackInvalid
from oracle_server.pack import check_pack, compile_pack, load_compiled, open_oracle, remove_partial_directories
from oracle_server.pack.compile import LAYOUT_VERSION
from oracle_server.sampling.answer import SUPPORT_EXACT
from oracle_server.sampling.draws import engine_key

KEY = engine_key(1, "e")


def test_a_composed_pack_answers_from_its_file(tmp_path: Path) -> None:
    options: dict[str, Any] = {"skew_decode": 0.04, "graph_capture_sizes": (8, 16), "host_ns_per_sequence": 5.0}
    digest = build_composed_pack(
        tmp_path / "pack", ratios=(0.5, 2.0), composed=options, prep_ns=11, copy_ns=22, knowledge={"logits": 3}
    )
    report = compile_pack(tmp_path / "pack", tmp_path / "compiled")
    assert report.digest == digest == check_pack(tmp_path / "pack").digest
    assert report.rows == {"operators.parquet": 98, "residuals.parquet": 2}
    compiled = load_compiled(tmp_path / "compiled")
    assert compiled.digest == digest
    assert compiled.manifest_json == (tmp_path / "pack" / "manifest.json").read_bytes()
    oracle = open_oracle(compiled)
    assert (oracle.kind, oracle.prep_ns, oracle.copy_ns, oracle.residual_pool) == ("composed", 11, 22, (0.5, 2.0))
    for step, query in enumerate((decode_query(5, 5000, 3000), mixed_query([(100, 0), (7, 700)], 3, 1000))):
        expected, support, _, known = composed_answer(
            plausible_operators(), query, KEY, step, ratios=(0.5, 2.0), knowledge={"logits": 3}, **options
        )
        answer = oracle.answer(query, KEY, step)
        assert abs(answer.latency_ns - expected) <= 0.51
        assert (answer.support, answer.knowledge) == (support, known)


def test_a_sampled_pack_answers_from_its_file(tmp_path: Path) -> None:
    options: dict[str, Any] = {"min_samples": 50, "concurrency_bucket_width": 5, "table_rule": "new_requests"}
    build_sampled_pack(tmp_path / "pack", sampled=options, transition=True)
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    oracle = open_oracle(load_compiled(tmp_path / "compiled"))
    for step in range(50):
        query = decode_query(1 + step, 5000, previous_prefill_tokens=step % 2)
        expected = sampled_answer(plausible_samples(), query, KEY, step, transition=True, **options)
        answer = oracle.answer(query, KEY, step)
        assert (answer.latency_ns, answer.support, answer.distance) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"neighbors": "nearest", "concurrency_bucket_width": 5},
        {"neighbors": "hierarchical", "context_bucket_width": 1024, "min_samples": 7},
    ],
)
def test_a_pack_of_ranked_neighbors_answers_from_its_file(options: dict[str, Any], tmp_path: Path) -> None:
    samples = plausible_samples()
    samples["context_tokens"] = np.arange(samples["table"].size, dtype=np.int64) * 37 % 9000
    build_sampled_pack(tmp_path / "pack", samples=samples, sampled=options, transition=True)
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    oracle = open_oracle(load_compiled(tmp_path / "compiled"))
    for step in range(50):
        query = decode_query(1 + step, 5000, previous_prefill_tokens=step % 2)
        answer = oracle.answer(query, KEY, step)
        expected = ranked_answer(samples, query, KEY, step, transition=True, **options)
        assert (answer.latency_ns, answer.support, answer.distance) == expected
        body = oracle.answer(query._replace(previous_prefill_tokens=0), KEY, step)
        assert (oracle.decode_record(1 + step, 5000, 5000) is None) is (body.support != SUPPORT_EXACT)


def test_a_pack_of_fixed_k_answers_from_its_file(tmp_path: Path) -> None:
    build_sampled_pack(tmp_path / "pack", sampled={"fixed_buckets": 3})
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    oracle = open_oracle(load_compiled(tmp_path / "compiled"))
    for step in range(50):
        query = decode_query(1 + step, 5000)
        answer = oracle.answer(query, KEY, step)
        expected = sampled_answer(plausible_samples(), query, KEY, step, fixed_buckets=3)
        assert (answer.latency_ns, answer.support, answer.distance) == expected


def test_every_step_of_a_constant_pack_costs_the_same_and_none_is_extrapolated(tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack", latency_ns=12_345_678)
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    oracle = open_oracle(load_compiled(tmp_path / "compiled"))
    for query in (
        decode_query(1, 1),
        decode_query(1000, 2**40, 2**31),
        decode_query(3, 300, tokens=9),
        mixed_query([(1, 0)]),
        mixed_query([(131_072, 1_000_000), (1, 5)], 500, 5_000_000),
    ):
        answer = oracle.answer(query, KEY, 5)
        assert answer.latency_ns == 12_345_678
        assert answer.support != 3


def test_arrays_are_mapped_and_read_only(tmp_path: Path) -> None:
    build_sampled_pack(tmp_path / "pack")
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    for array in load_compiled(tmp_path / "compiled").arrays.values():
        assert isinstance(array.base, np.memmap)
        assert not array.flags.writeable


def test_files_have_page_checksums_and_the_allowed_encodings(tmp_path: Path) -> None:
    build_composed_pack(tmp_path / "pack", ratios=(1.0, 1.1))
    footer = pq.ParquetFile(tmp_path / "pack" / "operators.parquet").metadata
    chunks = [footer.row_group(0).column(i) for i in range(footer.num_columns)]
    assert {chunk.compression for chunk in chunks} == {"ZSTD"}
    assert {e for chunk in chunks for e in chunk.encodings} <= {"PLAIN", "RLE", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT"}


def test_a_pack_is_never_overwritten(tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack")
    with pytest.raises(InvalidArgument, match="never overwritten"):
        build_constant_pack(tmp_path / "pack")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match="never overwritten"):
        build_constant_pack(tmp_path / "link")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"latency_ns": [0, 5]}, "above 0"),
        ({"latency_ns": [1.5, 5]}, "does not fit int64"),
        ({"total_tokens": [2**31, 5]}, "does not fit int32"),
        ({"total_tokens": [[1], [2]]}, "one-dimensional"),
        ({"total_tokens": ["1", "2"]}, "one-dimensional"),
        ({"total_tokens": [1, 2, 3]}, "different lengths"),
        ({"table": [0, 0]}, "no sample for the table"),
        ({"surplus": [0, 0]}, "columns are"),
    ],
)
def test_what_the_checker_refuses_is_not_written(tmp_path: Path, samples: dict[str, Any], message: str) -> None:
    columns: dict[str, Any] = {
        "table": [0, 1],
        "total_tokens": [1, 2],
        "concurrency": [1, 1],
        "context_tokens": [-1, -1],
        "previous_prefill_tokens": [-1, -1],
        "latency_ns": [5_000_000, 6_000_000],
    }
    build_sampled_pack(tmp_path / "fine", samples=columns)
    with pytest.raises(PackInvalid, match=message):
        build_sampled_pack(tmp_path / "pack", samples={**columns, **samples})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine"]


def test_every_file_and_directory_is_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    build_constant_pack(tmp_path / "packs" / "one")
    files, after = events[: events.index("rename to one")], events[events.index("rename to one") + 1 :]
    assert files[:2] == ["operators.parquet", "manifest.json"]
    assert files[2].startswith(".one.")
    assert after == ["packs"]


def test_a_failing_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        build_constant_pack(tmp_path / "pack")
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_leaves_is_removed(tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack")
    (tmp_path / ".pack.abcdef.partial").mkdir()
    (tmp_path / ".pack.abcdef.partial" / "operators.parquet").write_bytes(b"half")
    (tmp_path / ".link.partial").symlink_to(tmp_path / "pack")
    assert remove_partial_directories(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".link.partial", "pack"]


def test_compiling_twice_leaves_the_first_result(tmp_path: Path) -> None:
    build_constant_pack(tmp_path / "pack")
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    before = (tmp_path / "compiled").stat().st_ino
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    assert (tmp_path / "compiled").stat().st_ino == before


def other_layout(compiled: Path) -> None:
    layout = json.loads((compiled / "layout.json").read_text())
    (compiled / "layout.json").write_text(json.dumps({**layout, "layout_version": LAYOUT_VERSION + 1}))


def layout_without_version(compiled: Path) -> None:
    (compiled / "layout.json").write_text("{}")


def layout_that_is_no_object(compiled: Path) -> None:
    (compiled / "layout.json").write_text("[1]")


def layout_that_leaves_the_directory(compiled: Path) -> None:
    layout = json.loads((compiled / "layout.json").read_text())
    layout["arrays"]["../grid"] = layout["arrays"].pop("grid")
    (compiled / "layout.json").write_text(json.dumps(layout))


def truncated_array(compiled: Path) -> None:
    data = (compiled / "grid.npy").read_bytes()
    (compiled / "grid.npy").write_bytes(data[:-8])


def empty_array(compiled: Path) -> None:
    (compiled / "grid.npy").write_bytes(b"")


def array_of_objects(compiled: Path) -> None:
    np.save(compiled / "grid.npy", np.array([{}], dtype=object), allow_pickle=True)


def array_of_another_shape(compiled: Path) -> None:
    np.save(compiled / "grid.npy", np.zeros(3))


def absent_array(compiled: Path) -> None:
    (compiled / "grid.npy").unlink()


def absent_layout(compiled: Path) -> None:
    (compiled / "layout.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        other_layout,
        layout_without_version,
        layout_that_is_no_object,
        layout_that_leaves_the_directory,
        truncated_array,
        empty_array,
        array_of_objects,
        array_of_another_shape,
        absent_array,
        absent_layout,
    ],
)
def test_a_damaged_compiled_pack_is_refused_and_compiled_anew(tmp_path: Path, damage: Any) -> None:
    build_constant_pack(tmp_path / "pack")
    compile_pack(tmp_path / "pack", tmp_path / "compiled")
    damage(tmp_path / "compiled")
    with pytest.raises(PackInvalid, match=r"compile it again|cannot be opened"):
        load_compiled(tmp_path / "compiled")
    report = compile_pack(tmp_path / "pack", tmp_path / "compiled")
    assert load_compiled(tmp_path / "compiled").digest == report.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compiled", "pack"]


def test_unusual_numbers_are_told(tmp_path: Path) -> None:
    samples = plausible_samples()
    build_sampled_pack(tmp_path / "micro", samples={**samples, "latency_ns": samples["latency_ns"] // 1000})
    (warning,) = check_pack(tmp_path / "micro").warnings
    assert "is latency_ns in nanoseconds?" in warning
    build_sampled_pack(tmp_path / "same", samples={**samples, "latency_ns": np.full_like(samples["latency_ns"], 7e6)})
    (warning,) = check_pack(tmp_path / "same").warnings
    assert "hold one and the same latency" in warning
    operators = plausible_operators()
    operators["dense_gemm"][4096,] /= 2
    build_composed_pack(tmp_path / "falls", operators=operators)
    (warning,) = check_pack(tmp_path / "falls").warnings
    assert "dense_gemm falls by more than 10 % at 1 grid points" in warning
