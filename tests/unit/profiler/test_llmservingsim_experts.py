"""Import of LLMServingSim bundles of MoE models: what experts cost, what ranks exchange, which tables are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builders import decode_query, mixed_query
from bundles import (
    CONFIG,
    EXPERTS,
    LAYERS,
    META,
    MOE_CONFIG,
    MOE_LAYER,
    NOW,
    RUN,
    Rows,
    attention_us,
    build_bundle,
    dense_us,
    expert_us,
    moe_request,
    moe_tables,
    request,
    tables,
    write_tables,
)
from oracle_server.errors import InvalidArgument
from oracle_server.pack import check_pack, open_oracle
from profiler.cli import main
from profiler.llmservingsim import ImportRequest, read_bundle
from profiler.llmservingsim_experts import expected_experts
from profiler.llmservingsim_link import RingLink
from profiler.llmservingsim_pack import write_bundle
from profiler.surface import read_pack

# 16 gigabytes per second, 5 us a hop.
LINK = RingLink(16e9, 5e-6, "test")


def operators_of(asked: ImportRequest) -> dict[str, Any]:
    return {operator.name: operator for operator in read_bundle(asked).operators}


def open_bundle(asked: ImportRequest, directory: Path) -> Any:
    write_bundle(read_bundle(asked), directory, created=NOW)
    return open_oracle(read_pack(directory)[1])


def test_a_step_of_a_moe_model_costs_its_layers_and_the_experts_it_reaches(tmp_path: Path) -> None:
    oracle = open_bundle(moe_request(tmp_path), tmp_path / "pack")

    def layers_us(tokens: int, rows: int) -> float:
        layer = sum(dense_us(name, tokens) for name in MOE_LAYER) + dense_us("layernorm", tokens)
        ends = dense_us("embedding", tokens) + dense_us("final_layernorm", tokens)
        return LAYERS * layer + ends + dense_us("lm_head", rows) + dense_us("sampler", rows)

    # One token reaches exactly the two experts it chooses.
    one = oracle.answer(decode_query(1, 16), 0, 0)
    assert one.latency_ns == round(1e3 * (layers_us(1, 1) + LAYERS * (attention_us(0, 0, 1, 16) + expert_us(1, 2))))
    assert one.knowledge == 3
    # Sixteen reach 8 (1 - 0.75^16) = 7.92 of them: nearly at the last point of the row.
    reached = 8 * (1 - 0.75**16)
    block = expert_us(16, 4) + (expert_us(16, 8) - expert_us(16, 4)) * (reached - 4) / 4
    many = oracle.answer(mixed_query([(16, 16)]), 0, 0)
    assert many.latency_ns == round(1e3 * (layers_us(16, 1) + LAYERS * (attention_us(16, 16, 0, 0) + block)))
    assert many.knowledge == 3


@pytest.mark.parametrize(("tokens", "expected"), [(1, 2.0), (2, 3.5), (3, 4.625), (1000, 8.0)])
def test_tokens_that_choose_evenly_reach_so_many_experts(tokens: int, expected: float) -> None:
    assert expected_experts(8, 2, 1, tokens) == pytest.approx(expected)
    assert expected_experts(8, 2, 4, tokens) == pytest.approx(expected / 4)


def test_between_rows_the_cost_is_linear_in_tokens_at_the_experts_reached(tmp_path: Path) -> None:
    moe = operators_of(moe_request(tmp_path))["moe"]
    # Three tokens reach 4.625 experts; the row of two tokens ends at four, and its line goes on.
    two = expert_us(2, 4) + 0.625 * (expert_us(2, 4) - expert_us(2, 2)) / 2
    four = expert_us(4, 4) + 0.625 * (expert_us(4, 8) - expert_us(4, 4)) / 4
    assert moe.points[0][2] == 3
    assert moe.latency_ns[2] == pytest.approx(1e3 * LAYERS * (two + four) / 2)
    assert moe.knowledge[2] == 4
    assert [moe.points[0][-1], moe.knowledge[0], moe.knowledge[15]] == [64, 3, 3]


def test_data_parallel_ranks_run_their_experts_on_the_tokens_of_all(tmp_path: Path) -> None:
    asked = moe_request(tmp_path, moe_tables(1, 2), data_parallel=2, expert_parallel=2, link=LINK)
    found = operators_of(asked)
    # Four tokens here and four there reach 4 (1 - 0.75^8) of the four experts of a rank.
    reached = 4 * (1 - 0.75**8)
    block = expert_us(8, 2, 2) + (expert_us(8, 4, 2) - expert_us(8, 2, 2)) * (reached - 2) / 2
    assert found["moe"].latency_ns[3] == pytest.approx(1e3 * LAYERS * block)
    assert found["moe"].points[0][-1] == 32
    # Four tokens of 64 16-bit numbers, there with weight and id of two experts each, and back without.
    hidden, route = 4 * 64 * 2, 4 * 2 * 8
    gather, scatter = (5 + 1e6 * size / 16e9 for size in (hidden + route, hidden))
    assert found["expert_exchange"].latency_ns[3] == pytest.approx(1e3 * LAYERS * (gather + scatter))
    assert set(found["expert_exchange"].knowledge) == {3}
    assert "all_reduce" not in found


def test_a_table_of_one_rank_with_all_experts_is_read_at_the_share_of_tokens_a_rank_works_on(tmp_path: Path) -> None:
    asked = moe_request(tmp_path, data_parallel=2, expert_parallel=2, link=LINK)
    moe = operators_of(asked)["moe"]
    reached = 4 * (1 - 0.75**16)
    block = expert_us(8, 2) + (expert_us(8, 4) - expert_us(8, 2)) * (reached - 2) / 2
    assert moe.latency_ns[7] == pytest.approx(1e3 * LAYERS * block)
    assert moe.points[0][-1] == 64
    # One token of each reaches 1.75 of four experts; nothing below two was measured.
    assert (moe.latency_ns[0], moe.knowledge[0]) == (pytest.approx(1e3 * LAYERS * expert_us(1, 2)), 4)


def two_ranks(root: Path, **fields: Any) -> ImportRequest:
    """A bundle of two tensor-parallel ranks; experts were profiled with one."""
    overrides = {"num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 256}
    content = moe_tables(1, 2, 4)
    experts = {"moe.csv": content.pop("moe.csv")}
    meta = {"tp_degrees": [1, 2], "engine_effective": {**META["engine_effective"], "hf_overrides": overrides}}
    directory = build_bundle(root, content, meta=meta, run=None, folder="tp2")
    write_tables(directory / "tp1", experts)
    (root / "llama.json").write_text(json.dumps(MOE_CONFIG))
    given = {"kv_blocks": 77, "device_memory_bytes": 1 << 30, "link": LINK, "tensor_parallel": 2}
    return request(root, **{**given, **fields})


def test_tensor_parallel_ranks_share_the_experts_and_reduce_as_before(tmp_path: Path) -> None:
    found = operators_of(two_ranks(tmp_path, expert_parallel=2))
    reached = 4 * (1 - 0.75**16)
    block = expert_us(16, 2, 2) + (expert_us(16, 4, 2) - expert_us(16, 2, 2)) * (reached - 2) / 2
    assert found["moe"].latency_ns[15] == pytest.approx(1e3 * LAYERS * block)
    reduce_us = 2 * (5 + 1e6 * (64 * 2 / 2) / 16e9)
    assert found["all_reduce"].latency_ns[0] == pytest.approx(1e3 * 2 * LAYERS * reduce_us)
    assert "expert_exchange" not in found


def test_with_both_the_last_all_reduce_of_a_layer_becomes_a_gather(tmp_path: Path) -> None:
    found = operators_of(two_ranks(tmp_path, data_parallel=2, expert_parallel=4))
    reduce_us = 2 * (5 + 1e6 * (64 * 2 / 2) / 16e9)
    assert found["all_reduce"].latency_ns[0] == pytest.approx(1e3 * LAYERS * reduce_us)
    # Five tokens are shares of three, on a ring of four ranks and then on one of two.
    hidden, route = 3 * 64 * 2, 3 * 2 * 8
    ring = 3 * (5 + 1e6 * (hidden + route) / 16e9) + 3 * (5 + 1e6 * hidden / 16e9)
    assert found["expert_exchange"].latency_ns[4] == pytest.approx(1e3 * LAYERS * (ring + 5 + 1e6 * hidden / 16e9))


@pytest.mark.parametrize(
    ("ran", "asked", "message"),
    [
        ({}, {"data_parallel": 2, "expert_parallel": 2}, r"\(its run was of data parallel 1\)"),
        (
            {"data_parallel_size": 2, "enable_expert_parallel": True},
            {"data_parallel": 2, "expert_parallel": 2},
            r"\(its run was of data parallel 2\)",
        ),
        ({"data_parallel_size": 2, "enable_expert_parallel": True}, {}, r"\(its run was of data parallel 2\)"),
    ],
)
def test_the_kv_blocks_of_a_run_with_other_ranks_are_not_taken(
    ran: dict[str, Any], asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One rank of two holds half of the experts, and the count beside two ranks may be their sum."""
    unknown = replace(moe_request(tmp_path, **asked), link=LINK if asked else None, kv_blocks_assumed=None)
    write_run(tmp_path, ran)
    with pytest.raises(InvalidArgument, match=message):
        read_bundle(unknown)
    bundle = read_bundle(replace(unknown, kv_blocks=456))
    assert (bundle.kv_cache.blocks, bundle.kv_cache.basis) == (456, "measured")


def test_the_kv_blocks_of_a_run_whose_experts_were_cut_are_not_those_of_whole_ones(tmp_path: Path) -> None:
    asked = two_ranks(tmp_path, expert_parallel=2, kv_blocks=None)
    write_run(tmp_path, {"tensor_parallel_size": 2})
    with pytest.raises(InvalidArgument, match=r"\(its run was of expert parallel 1\)"):
        read_bundle(asked)
    write_run(tmp_path, {"tensor_parallel_size": 2, "enable_expert_parallel": True})
    assert (read_bundle(asked).kv_cache.blocks, read_bundle(asked).kv_cache.basis) == (123, "measured")


def write_run(root: Path, engine_kwargs: dict[str, Any]) -> None:
    run = RUN | {"engine_kwargs": RUN["engine_kwargs"] | engine_kwargs}
    (root / "bundle" / "run").mkdir(exist_ok=True)
    (root / "bundle" / "run" / "meta.json").write_text(json.dumps(run))


def test_layers_without_experts_keep_their_dense_part(tmp_path: Path) -> None:
    content = tables() | {"moe.csv": moe_tables()["moe.csv"]}
    asked = moe_request(tmp_path, content)
    config = MOE_CONFIG | {"decoder_sparse_step": 2, "architectures": ["Qwen2MoeForCausalLM"]}
    (tmp_path / "llama.json").write_text(json.dumps(config))
    found = operators_of(asked)
    assert found["moe"].latency_ns[0] == pytest.approx(1e3 * expert_us(1, 2))
    gemm = LAYERS * (dense_us("qkv_proj", 1) + dense_us("o_proj", 1)) + dense_us("gate_up_proj", 1)
    assert found["dense_gemm"].latency_ns[0] == pytest.approx(1e3 * (gemm + dense_us("down_proj", 1)))


def test_the_manifest_says_what_is_assumed_of_the_routing(tmp_path: Path) -> None:
    asked = moe_request(tmp_path, moe_tables(2), data_parallel=2, expert_parallel=2, link=LINK)
    write_bundle(read_bundle(asked), tmp_path / "pack", created=NOW)
    manifest = check_pack(tmp_path / "pack").manifest
    by_name = {correction.name: correction for correction in manifest.corrections}
    assert by_name["experts_per_token"].value == 2
    assert "reaches 4 (1 - (1 - 2 / 8)^(2 T)) of the 4 experts" in by_name["experts_per_token"].reason
    assert "all-gather and reduce-scatter of tokens over 2 ranks" in by_name["link_gbytes_per_s"].reason
    assert (manifest.parallel.tensor, manifest.parallel.data, manifest.device.count) == (1, 2, 1)
    assert {"moe", "expert_exchange", "sha256 moe.csv"} <= set(manifest.provenance)


def _edit(change: Callable[[Rows], Any]) -> dict[str, Rows]:
    content = moe_tables()
    change(content["moe.csv"])
    return content


FAULTS: dict[str, tuple[Callable[[Rows], Any], str]] = {
    "NaN": (lambda rows: rows[3].__setitem__(2, "nan"), "moe.csv, line 5: time_us is 'nan'"),
    "a negative time": (lambda rows: rows[0].__setitem__(2, -1.0), "moe.csv, line 2: time_us is '-1.0'"),
    "half an expert": (lambda rows: rows[0].__setitem__(1, 2.5), "moe.csv, line 2: activated_experts is '2.5'"),
    "no token": (lambda rows: rows[0].__setitem__(0, 0), "line 2: tokens=0, activated_experts=2 is no batch"),
    "too many experts": (lambda rows: rows[-1].__setitem__(1, 9), "activated_experts=9, but a rank holds 8 of the 8"),
    "experts out of reach": (
        lambda rows: rows.insert(0, [1, 4, 9.0]),
        "moe.csv, line 2: tokens=1, activated_experts=4, but 1 tokens choose 2 experts each",
    ),
    "a row given twice": (
        lambda rows: rows.append(rows[2]),
        "moe.csv, line 20: tokens=2, activated_experts=4 is given twice, first in line 4",
    ),
    "a gap in a row": (
        lambda rows: rows.remove([8, 4, expert_us(8, 4)]),
        "moe.csv has no row for tokens=8, activated_experts=4",
    ),
    "a row's end": (
        lambda rows: rows.remove([64, 8, expert_us(64, 8)]),
        "moe.csv has no row for tokens=64, activated_experts=8",
    ),
    "a missing row": (
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row[0] != 16]),
        "moe.csv has no rows between tokens=8 and tokens=32",
    ),
    "no first token": (lambda rows: rows.pop(0), "moe.csv begins at 2 tokens"),
    "an early end": (
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row[0] < 64]),
        "moe.csv ends at 32 tokens and 8 experts",
    ),
    "few experts": (
        lambda rows: rows.__setitem__(slice(None), [row for row in rows if row[1] < 8]),
        "moe.csv ends at 64 tokens and 4 experts",
    ),
    "no rows": (lambda rows: rows.clear(), "moe.csv has no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_table_of_experts_is_refused_with_the_row_at_fault(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    with pytest.raises(InvalidArgument) as refused:
        read_bundle(moe_request(tmp_path, _edit(change)))
    assert message in str(refused.value)
    assert refused.value.field == "moe.csv"


@pytest.mark.parametrize(
    ("groups", "fields", "message"),
    [
        ((1,), {"expert_parallel": 2}, r"--ep 2 with --tp 1 --dp 1: .*; give --ep 1"),
        ((1,), {"data_parallel": 2, "link": LINK}, r"--ep 1 with --tp 1 --dp 2: .*; give --ep 2"),
        ((1,), {"data_parallel": 2, "expert_parallel": 2, "link": LINK}, "expert parallel 1, not for --ep 2"),
        ((2, 4), {}, "expert parallel 2, 4, not for --ep 1"),
        ((1,), {"data_parallel": 3, "expert_parallel": 3}, "8 experts cannot be spread over --ep 3"),
        ((1, 2), {"data_parallel": 2, "expert_parallel": 2}, "give --link-gbytes-per-s and --link-latency-us"),
    ],
)
def test_ranks_that_the_table_is_not_of_are_refused(
    groups: tuple[int, ...], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read_bundle(moe_request(tmp_path, moe_tables(*groups), **fields))


def test_config_and_bundle_have_to_agree_about_experts(tmp_path: Path) -> None:
    asked = moe_request(tmp_path)
    table = tmp_path / "bundle" / "tp1" / "moe.csv"
    for changes, message in (
        ({"num_local_experts": None}, "names no experts"),
        ({"num_experts_per_tok": 0}, "does not say which of 8 experts run: 0 a token"),
        ({"num_experts_per_tok": 9}, "9 a token"),
        ({"num_local_experts": EXPERTS // 2}, "a rank holds 4 of the 4 experts"),
    ):
        (tmp_path / "llama.json").write_text(json.dumps(MOE_CONFIG | changes))
        with pytest.raises(InvalidArgument, match=message):
            read_bundle(asked)
    (tmp_path / "llama.json").write_text(json.dumps(MOE_CONFIG))
    table.unlink()
    with pytest.raises(InvalidArgument, match=r"8 experts, but the bundle has no moe\.csv"):
        read_bundle(asked)


def test_shared_experts_are_not_spread_over_ranks(tmp_path: Path) -> None:
    asked = moe_request(tmp_path, moe_tables(1, 2), data_parallel=2, expert_parallel=2, link=LINK)
    (tmp_path / "llama.json").write_text(json.dumps(MOE_CONFIG | {"shared_expert_intermediate_size": 64}))
    with pytest.raises(InvalidArgument, match="shared experts"):
        read_bundle(asked)


def test_a_dense_model_has_neither_expert_parallelism_nor_a_link_between_its_replicas(tmp_path: Path) -> None:
    build_bundle(tmp_path)
    assert json.loads((tmp_path / "llama.json").read_text()) == CONFIG
    with pytest.raises(InvalidArgument, match="the model has no experts"):
        read_bundle(request(tmp_path, expert_parallel=2))
    with pytest.raises(InvalidArgument, match="exchange nothing"):
        read_bundle(request(tmp_path, data_parallel=2, link=LINK))


def test_the_command_imports_a_moe_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe_request(tmp_path, moe_tables(1, 2))
    arguments = ["import", "llmservingsim", str(tmp_path / "bundle"), "--model-config", str(tmp_path / "llama.json")]
    ranks = ["--dp", "2", "--ep", "2", "--link-gbytes-per-s", "16", "--link-latency-us", "5", "--kv-blocks", "77"]
    assert main([*arguments, *ranks, "-o", str(tmp_path / "pack")]) == 0
    told = capsys.readouterr().out
    assert "moe                  32 points, modelled" in told
    assert "expert_exchange      64 points, modelled 100 %" in told
    assert main([*arguments, "--dp", "2", "-o", str(tmp_path / "other")]) == 2
    assert "give --ep 2" in capsys.readouterr().err
