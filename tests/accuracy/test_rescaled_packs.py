"""Packs of another device or another maker, rescaled to 50 to 200 measured steps, judged on steps not used."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import mixed_query
from gates import Gates
from oracle_server.pack import open_oracle
from oracle_server.sampling.shape import StepQuery
from profiler.llmservingsim import ImportRequest, read_bundle
from profiler.llmservingsim_pack import write_bundle
from profiler.rescale_pack import RescaleRequest, rescale, write_rescaled
from profiler.surface import read_pack
from profiler.synthesize import SynthesisRequest, synthesize, write_synthesis

pytestmark = pytest.mark.accuracy

_LLAMA = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "max_position_embeddings": 16384}
CODELLAMA_34B = _LLAMA | {
    "num_hidden_layers": 48,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LLAMA_70B = CODELLAMA_34B | {"num_hidden_layers": 80, "intermediate_size": 28672}


# Bounds: about twice what is measured. What remains of a mixed step of 70B is its prompts' sizes, which BLIS's table
# does not hold, and the tables' shape.
@pytest.mark.parametrize(
    ("file", "config", "tensor_parallel", "mean_at_most"),
    [
        ("codellama-34b-tp2-general.parquet", CODELLAMA_34B, 2, 1.5),
        ("llama-2-70b-hf-tp4-codegen.parquet", LLAMA_70B, 4, 1.5),
    ],
)
@pytest.mark.parametrize("steps", [50, 200])
def test_a_synthesized_pack_is_right_on_average_after_real_steps(
    file: str,
    config: Mapping[str, Any],
    tensor_parallel: int,
    mean_at_most: float,
    steps: int,
    gates: Gates,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("aiconfigurator_core", reason="the `synthesize` extra is not installed")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    request = SynthesisRequest(
        system="h100_sxm",
        model_directory=tmp_path / "model",
        tensor_parallel=tensor_parallel,
        vllm_version="0.15.1",
    )
    write_synthesis(synthesize(request), tmp_path / "pack")
    rescaled = rescale(RescaleRequest(tmp_path / "pack", data_folder / "blis_steps" / file, steps=steps))
    before, after = rescaled.unseen_before_percent, rescaled.unseen_after_percent
    what = f"{file.removesuffix('.parquet')}, fit on {steps} steps, {rescaled.unseen} others"
    gate = "synthesized pack rescaled to real H100 steps"
    gates.source(gate, "inference-sim/inference-sim @ 9293b22 (BLIS): steps of real vLLM 0.15.1 on H100")
    gates.check(gate, f"{what}: mean error", after[0], at_most=mean_at_most, controls={"before": before[0]})
    gates.check(gate, f"{what}: mean absolute", after[1], at_most=before[1], controls={"before": before[1]})


def test_operators_of_one_gpu_become_those_of_another(gates: Gates, data_folder: Path, tmp_path: Path) -> None:
    """The truth is the other bundle's own operators, scattered as real steps are."""
    source = data_folder / "llmservingsim"
    for bundle in ("RTX4090", "RTXPRO6000"):
        directory = source / f"{bundle}-Llama-3.1-8B-tp1"
        request = ImportRequest(directory, source / "Llama-3.1-8B.config.json", kv_blocks_assumed=2588)
        write_bundle(read_bundle(request), tmp_path / bundle)
    truth = open_oracle(read_pack(tmp_path / "RTX4090")[1])
    queries = serving_steps(900)
    latency_ns = [truth.answer(query, 0, 0).latency_ns for query in queries]
    scatter = np.random.default_rng(3).lognormal(0.0, 0.012, len(queries))
    write_steps(tmp_path / "steps.csv", queries, np.array(latency_ns) * scatter)
    gate = "PRO 6000 operators rescaled to RTX 4090 steps"
    gates.source(gate, "operators by casys-kaist/LLMServingSim @ 5daddb2, scattered by 1.2 % here")
    for steps in (50, 200):
        rescaled = rescale(RescaleRequest(tmp_path / "RTXPRO6000", tmp_path / "steps.csv", steps=steps))
        before, after = rescaled.unseen_before_percent, rescaled.unseen_after_percent
        what = f"fit on {steps} steps, {rescaled.unseen} others"
        gates.check(gate, f"{what}: mean error", after[0], at_most=2.0, controls={"before": before[0]})
        gates.check(gate, f"{what}: mean absolute", after[1], at_most=12.0, controls={"before": before[1]})
    write_rescaled(rescaled, tmp_path / "rescaled")
    oracle = open_oracle(read_pack(tmp_path / "rescaled")[1])
    errors: dict[str, list[float]] = {"decode": [], "mixed": []}
    for query, expected in zip(queries, latency_ns, strict=True):
        kind = "mixed" if query.chunk_tokens else "decode"
        errors[kind].append(oracle.answer(query, 0, 0).latency_ns / expected - 1.0)
    for kind, found in errors.items():
        gates.check(gate, f"the written pack, {len(found)} {kind} steps: mean error", 100 * float(np.mean(found)))


def serving_steps(count: int) -> list[StepQuery]:
    """Steps as a server with chunked prefill runs them: one in three carries a chunk."""
    random = np.random.default_rng(2)
    steps = []
    for _ in range(count):
        n = int(random.integers(1, 64))
        contexts = np.exp(random.normal(6.5, 0.7, n)).astype(int) + 16
        chunks = [(int(random.integers(16, 1024)), int(random.choice([0, 512])))] if random.random() < 1 / 3 else []
        steps.append(mixed_query(chunks, n, int(contexts.sum()), int(contexts.max())))
    return steps


def write_steps(path: Path, queries: Sequence[StepQuery], latency_ns: Iterable[float]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            "num_decode_requests decode_context_tokens max_decode_context_tokens prefill_chunk_tokens "
            "prefill_chunk_context_tokens latency_ns".split()
        )
        for query, latency in zip(queries, latency_ns, strict=True):
            writer.writerow(
                [
                    query.num_decode_requests,
                    query.decode_context_tokens,
                    query.max_decode_context_tokens,
                    " ".join(map(str, query.chunk_tokens)),
                    " ".join(map(str, query.chunk_context)),
                    round(latency),
                ]
            )
