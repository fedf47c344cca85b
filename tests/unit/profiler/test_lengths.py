"""Tables of output lengths from traces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format

from oracle_server.errors import InvalidArgument
from oracle_server.sampling.lengths import LengthClass, LengthTables
from profiler.lengths import Trace, fit_lengths, read_trace, write_lengths
from step_oracle.v1 import experiment_pb2


def _trace(prompts: list[int], outputs: list[int]) -> Trace:
    return Trace("made", np.array(prompts), np.array(outputs), 0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nx,10,1\ny,20,2\nz,5,0\n"),
        ("mooncake.csv", "timestamp_ms,input_length,output_length,n_blocks\n0,10,1,1\n0,20,2,1\n0,0,3,1\n"),
        ("mooncake.jsonl", '{"input_length": 10, "output_length": 1}\n\n{"input_length": 20, "output_length": 2}\n'),
        ("bench.json", '{"input_lens": [10, 20, 7], "output_lens": [1, 2, 0], "ttfts": []}'),
    ],
)
def test_every_trace_form_gives_prompts_and_outputs(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    trace = read_trace(tmp_path / name)
    assert trace.prompt_tokens.tolist() == [10, 20]
    assert trace.output_tokens.tolist() == [1, 2]
    assert trace.dropped == (0 if name.endswith("jsonl") else 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has the columns a, b"),
        ("ContextTokens,GeneratedTokens\n1,x\n", "row 2: 'x' is no number of tokens"),
        ("ContextTokens,GeneratedTokens\n1\n", "row 2: None is no number of tokens"),
        ("ContextTokens,GeneratedTokens\n1,-2\n", "row 2"),
        ("ContextTokens,GeneratedTokens\n", "no request"),
        ('{"input_lens": [1], "output_lens": []}', "not lists of equal length"),
        ('{"input_length": 1}\n', "line 1: an object with input_length and output_length"),
        ('{"input_length": 1, "output_length": 1}\n{"in', "line 2: not JSON"),
        ('{"input_length": 1.5, "output_length": 1}\n', "1.5 is no number of tokens"),
    ],
)
def test_a_bad_trace_is_refused_with_its_row(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(InvalidArgument, match=message):
        read_trace(tmp_path / "trace")


def test_prompt_bins_hold_about_the_same_number_of_requests() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.lognormal(6, 1, 4000).astype(int) + 1
    fit = fit_lengths(_trace(prompts.tolist(), [5] * 3999 + [6]), bins=8, quantiles_per_bin=5)
    assert fit.prompt_bin_begin[0] == 0
    assert len(fit.prompt_bin_begin) == 8
    assert sum(fit.bin_requests) == 4000
    assert max(fit.bin_requests) < 1.1 * min(fit.bin_requests)


def test_a_bin_of_few_requests_is_merged() -> None:
    fit = fit_lengths(_trace([10] * 100 + [20] * 3, list(range(1, 104))), bins=8, quantiles_per_bin=5)
    assert fit.prompt_bin_begin == (0,)


def test_quantiles_are_those_of_the_bin() -> None:
    fit = fit_lengths(
        _trace([10] * 101 + [90] * 101, [*range(101, 202), *range(501, 602)]), bins=2, quantiles_per_bin=5
    )
    assert fit.prompt_bin_begin == (0, 90)
    quantiles = fit.table["classes"][0]["quantile_tokens"]
    assert quantiles == [101, 126, 151, 176, 201, 501, 526, 551, 576, 601]


def test_requests_that_reached_the_limit_count_as_cut() -> None:
    fit = fit_lengths(_trace([10] * 100, [*range(1, 81), *[200] * 20]), bins=1, quantiles_per_bin=11, limit=100)
    assert fit.censored_share == pytest.approx(0.20)
    assert fit.table["classes"][0]["quantile_tokens"][-1] == 100
    assert "20.0 % cut at 100 tokens" in fit.table["provenance"]


def test_a_pile_at_the_largest_length_is_taken_for_a_limit_and_said() -> None:
    fit = fit_lengths(_trace([10] * 100, [*range(1, 81), *[200] * 20]), bins=1, quantiles_per_bin=11)
    assert "20.0 % seemingly cut at 200 tokens" in fit.table["provenance"]
    assert fit_lengths(_trace([10] * 100, list(range(1, 101))), bins=1).censored_share == pytest.approx(0.01)


def test_the_file_is_a_length_table_of_the_proto(tmp_path: Path) -> None:
    fit = fit_lengths(_trace([10] * 100, list(range(1, 101))), bins=1, quantiles_per_bin=9)
    write_lengths(fit, tmp_path / "lengths.json")
    message = json_format.Parse((tmp_path / "lengths.json").read_text(), experiment_pb2.LengthTable())
    assert message.classes[0].quantiles_per_bin == 9
    tables = LengthTables(
        LengthClass(item.name, item.prompt_bin_begin, item.quantile_tokens, item.quantiles_per_bin)
        for item in message.classes
    )
    assert tables.draw(0, 10) == 1
    assert tables.draw(2**64 - 1, 10) == 100
    assert set(json.loads((tmp_path / "lengths.json").read_text())["classes"][0]) == {
        "name",
        "prompt_bin_begin",
        "quantile_tokens",
        "quantiles_per_bin",
    }


def test_a_table_in_use_is_not_overwritten(tmp_path: Path) -> None:
    fit = fit_lengths(_trace([10], [1]), bins=1, quantiles_per_bin=2)
    write_lengths(fit, tmp_path / "lengths.json")
    with pytest.raises(InvalidArgument, match="exists already"):
        write_lengths(fit, tmp_path / "lengths.json")
