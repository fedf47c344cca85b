"""Packs made from aiconfigurator-core's tables."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from oracle_server.errors import FailedPrecondition, InvalidArgument
from oracle_server.pack import Manifest, check_pack
from profiler.operators import Link
from profiler.silicon_tables import EXTRAPOLATED, INTERPOLATED, MEASURED, MODELLED
from profiler.synthesize import Synthesis, SynthesisRequest, residual_pool, synthesize, write_synthesis

pytest.importorskip("aiconfigurator_core", reason="the `synthesize` extra is not installed")

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "qwen3-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


def _written(request: SynthesisRequest, folder: Path) -> tuple[Synthesis, Manifest]:
    synthesis = synthesize(request)
    write_synthesis(synthesis, folder, created=NOW)
    return synthesis, check_pack(folder).manifest


def stated_width(synthesis: Synthesis) -> tuple[float, float]:
    assert synthesis.uncertainty is not None
    return synthesis.uncertainty.low_percent, synthesis.uncertainty.high_percent


def test_the_pack_is_self_contained_and_one_a_server_takes(model: Path, tmp_path: Path) -> None:
    _, manifest = _written(SynthesisRequest("h100_sxm", model), tmp_path / "pack")
    assert manifest.device.name == "NVIDIA H100 80GB HBM3"
    assert manifest.device.memory_bytes == 85_899_345_920
    assert (manifest.device.capability_major, manifest.device.capability_minor) == (9, 0)
    assert manifest.model.id == "qwen3-8b"
    assert manifest.model.shape.endswith("heads=32 kv_heads=8 head_dim=128 vocab=151936")
    assert manifest.kv_cache.basis == "estimated"
    assert manifest.kv_cache.bytes_per_token == 147_456
    assert manifest.engine.gpu_memory_utilization == 0.9
    assert {file.name for file in manifest.files} == {"operators.parquet", "residuals.parquet"}
    assert "aiconfigurator-core 0.12.0" in manifest.provenance["source"]
    assert any(key.startswith("sha256 systems/data/h100_sxm/gemm") for key in manifest.provenance)
    assert not any(str(tmp_path) in value for value in manifest.provenance.values())


def test_one_request_is_one_digest(model: Path, tmp_path: Path) -> None:
    digests = {
        write_synthesis(synthesize(SynthesisRequest("h100_sxm", model)), tmp_path / name, created=NOW)
        for name in ("a", "b")
    }
    assert len(digests) == 1


def test_every_correction_is_on_record_and_can_be_left_out(model: Path, tmp_path: Path) -> None:
    _, manifest = _written(SynthesisRequest("l40s", model), tmp_path / "pack")
    assert [item.name for item in manifest.corrections] == [
        "monotone_bandwidth_floor_gbytes_per_s",
        "history_floor",
        "skew",
        "mixed_decode_factor",
        "host_ns_per_step",
        "host_ns_per_sequence",
        "residual_sigma",
        "kv_overhead_gib",
    ]
    composed = manifest.latency.composed
    assert composed is not None
    assert (composed.skew_decode, composed.skew_mixed, composed.mixed_decode_factor) == (0.04, 0.04, 2.0)
    raw = synthesize(SynthesisRequest("l40s", model, corrections=False))
    assert [item.name for item in raw.corrections] == ["residual_sigma", "kv_overhead_gib"]
    assert stated_width(raw) == (10.0, 20.0)


def test_pieces_are_kept_apart_and_all_reduce_is_one_only_with_ranks(model: Path) -> None:
    alone = synthesize(SynthesisRequest("h100_sxm", model))
    pair = synthesize(SynthesisRequest("h100_sxm", model, tensor_parallel=2))
    names = [operator.name for operator in alone.operators]
    assert names == ["dense_gemm", "dense_elementwise", "logits", "generation_attention", "context_attention"]
    assert [operator.name for operator in pair.operators] == [*names[:2], "all_reduce", *names[2:]]


def test_labels_come_from_the_keys_of_the_tables(model: Path) -> None:
    operators = {item.name: item for item in synthesize(SynthesisRequest("h100_sxm", model)).operators}
    decode = operators["generation_attention"]
    requests, contexts = (list(axis) for axis in decode.points)

    def label(count: int, context: int) -> int:
        return int(decode.knowledge[requests.index(count), contexts.index(context)])

    assert label(64, 1024) == MEASURED
    assert label(3, 1024) == INTERPOLATED
    assert label(512, 131072) == EXTRAPOLATED
    assert set(operators["dense_elementwise"].knowledge.tolist()) == {MODELLED}
    assert MEASURED not in operators["context_attention"].knowledge


def test_a_given_link_replaces_the_all_reduce_of_the_tables(model: Path) -> None:
    request = SynthesisRequest("rtx_pro_6000_server", model, tensor_parallel=2, link=Link(20e9, 40e-6))
    synthesis = synthesize(request)
    operator = next(item for item in synthesis.operators if item.name == "all_reduce")
    # 36 layers of two all-reduces and one for the embedding; one token is 8 KiB.
    assert operator.latency_ns[0] == pytest.approx(73 * (40_000 + 8192 / 20))
    assert set(operator.knowledge.tolist()) == {MODELLED}
    assert stated_width(synthesis) == (-3.0, 10.0)
    assert stated_width(synthesize(replace(request, link=None))) == (30.0, 50.0)


def test_given_kv_blocks_are_taken_with_their_basis(model: Path, tmp_path: Path) -> None:
    request = SynthesisRequest("h100_sxm", model, kv_blocks=1234, kv_blocks_basis="measured")
    _, manifest = _written(request, tmp_path / "pack")
    assert (manifest.kv_cache.blocks, manifest.kv_cache.basis) == (1234, "measured")
    assert manifest.engine.gpu_memory_utilization is None


def test_an_8_bit_kv_cache_has_its_own_tables_and_twice_the_blocks(model: Path, tmp_path: Path) -> None:
    packs = {}
    for dtype in ("auto", "fp8"):
        packs[dtype] = _written(SynthesisRequest("h200_sxm", model, kv_cache_dtype=dtype), tmp_path / dtype)
    (long, long_manifest), (short, short_manifest) = packs["auto"], packs["fp8"]
    assert (long_manifest.model.kv_cache_dtype, short_manifest.model.kv_cache_dtype) == ("auto", "fp8")
    assert long_manifest.kv_cache.bytes_per_token == 2 * short_manifest.kv_cache.bytes_per_token
    assert short.kv_blocks in (2 * long.kv_blocks, 2 * long.kv_blocks + 1)
    attention = [next(item for item in pack.operators if item.name == "generation_attention") for pack in (long, short)]
    at = tuple(axis.index(value) for axis, value in zip(attention[0].points, (64, 4096), strict=True))
    assert attention[1].latency_ns[at] < 0.9 * attention[0].latency_ns[at]
    assert (attention[1].knowledge == MEASURED).any()


def test_a_version_with_synchronous_scheduling_ties_the_pack_to_it(model: Path, tmp_path: Path) -> None:
    _, manifest = _written(SynthesisRequest("h100_sxm", model, vllm_version="0.12.0"), tmp_path / "pack")
    assert manifest.engine.async_scheduling is False
    assert manifest.latency.composed is not None
    assert manifest.latency.composed.host_ns_per_step == 1_180_000


def test_nothing_is_connected_to(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("synthesize opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert synthesize(SynthesisRequest("h100_sxm", model)).operators


def test_the_residual_pool_has_mean_one_and_the_stated_spread() -> None:
    pool = residual_pool()
    assert pool.size == 256
    assert float(pool.mean()) == pytest.approx(1.0, abs=1e-6)
    assert float(np.log(pool).std()) == pytest.approx(0.012, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"system": "l4"}, "has no vLLM tables .* h100_sxm"),
        ({"tensor_parallel": 3}, "32 attention heads cannot be split"),
        ({"tensor_parallel": 0}, "tp is 0"),
        ({"kv_blocks": 0}, "kv_blocks is 0"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"link": Link(0.0, 0.0)}, "positive bandwidth"),
        ({"dtype": "int3"}, "dtype 'int3'"),
        ({"kv_cache_dtype": "int4"}, "tables know auto and fp8"),
    ],
)
def test_a_request_that_cannot_be_is_refused(changes: dict[str, Any], message: str, model: Path) -> None:
    fields: dict[str, Any] = {"system": "h100_sxm", "model_directory": model} | changes
    with pytest.raises(InvalidArgument, match=message):
        synthesize(SynthesisRequest(**fields))


def test_an_operator_without_a_table_needs_the_users_leave(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(QWEN3_8B | {"head_dim": 96}))
    with pytest.raises(InvalidArgument, match="--allow-transferred"):
        synthesize(SynthesisRequest("h100_sxm", model))
    synthesis = synthesize(SynthesisRequest("h100_sxm", model, allow_transferred=True))
    assert synthesis.transferred == ("context_attention (xshape)", "generation_attention (xshape)")
    assert stated_width(synthesis) == (-5.0, 55.0)


def test_a_device_unlike_any_compared_one_makes_a_pack_without_a_statement(model: Path, tmp_path: Path) -> None:
    synthesis, manifest = _written(SynthesisRequest("b60", model), tmp_path / "pack")
    assert (synthesis.uncertainty, manifest.uncertainty) == (None, None)


def test_the_missing_library_is_named_with_its_cure(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FailedPrecondition, match=r"pip install 'step-oracle\[synthesize\]'"):
        synthesize(SynthesisRequest("h100_sxm", model))
