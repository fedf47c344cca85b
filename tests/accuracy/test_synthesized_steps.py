"""A synthesized pack against the library it is made from, and against real H100 steps."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gates import Gates
from oracle_server.pack import open_oracle
from oracle_server.sampling.oracle import Oracle
from oracle_server.sampling.shape import StepQuery
from profiler.surface import read_pack
from profiler.synthesize import SynthesisRequest, synthesize, write_synthesis

pytestmark = pytest.mark.accuracy
pytest.importorskip("aiconfigurator_core", reason="the `synthesize` extra is not installed")

_LLAMA = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "max_position_embeddings": 16384}
LLAMA_8B = _LLAMA | {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
CODELLAMA_34B = _LLAMA | {
    "num_hidden_layers": 48,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LLAMA_70B = CODELLAMA_34B | {"num_hidden_layers": 80, "intermediate_size": 28672}

# Edges of concurrency within which a median is told, and the steps it takes for one.
REQUESTS = (1, 8, 16, 32, 48, 64, 96, 129)
LEAST_STEPS = 10


def _model(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _oracle(request: SynthesisRequest, folder: Path) -> Oracle:
    """The oracle of the pack as a server opens it, with the scatter taken out."""
    write_synthesis(synthesize(request), folder)
    _, compiled = read_pack(folder)
    return open_oracle(replace(compiled, arrays={**compiled.arrays, "residuals": np.ones(1, dtype=np.float32)}))


def _milliseconds(oracle: Oracle, chunk: int, history: int, requests: int, context: int) -> float:
    chunks = int(chunk > 0)
    longest = context if requests else 0
    query = StepQuery(
        (chunk,) * chunks,
        (history,) * chunks,
        requests,
        requests,
        requests * context,
        longest,
        requests + chunks,
        0,
        chunks,
    )
    return oracle.answer(query, 0, 0).latency_ns / 1e6


# Bounds: about twice what is measured (profiler/README.md), so that a coarser grid or an operator left out fails.
@pytest.mark.parametrize(("system", "tensor_parallel"), [("h100_sxm", 1), ("h100_sxm", 2), ("rtx_pro_6000_server", 1)])
def test_composed_steps_equal_the_librarys_own(system: str, tensor_parallel: int, gates: Gates, tmp_path: Path) -> None:
    from aiconfigurator_core.sdk import RustForwardPassPerfModel

    model = _model(tmp_path / "llama-8b", LLAMA_8B)
    request = SynthesisRequest(system=system, model_directory=model, tensor_parallel=tensor_parallel, corrections=False)
    oracle = _oracle(request, tmp_path / "pack")
    library = RustForwardPassPerfModel.from_native(
        {
            "schema_version": 1,
            "model_name": str(model),
            "system_name": system,
            "backend": "vllm",
            "backend_version": "0.24.0",
            "tp_size": tensor_parallel,
            "pp_size": 1,
            "extra": {},
        }
    )
    draw = random.Random(20)
    errors: dict[str, list[float]] = {"decode": [], "prefill": [], "mixed": []}
    for kind, found in errors.items():
        for _ in range(600):
            requests = int(2 ** draw.uniform(0, 8)) if kind != "prefill" else 0
            # Inside the measured region: beyond it the library itself jumps.
            context = int(2 ** draw.uniform(3, min(14, 19 - np.log2(max(requests, 1)))))
            chunk = int(2 ** draw.uniform(2, 12.9)) if kind != "decode" else 0
            history = draw.choice([0, int(2 ** draw.uniform(4, 13))])
            scheduled: dict[str, int] = {}
            if chunk:
                scheduled |= {
                    "num_prefill_requests": 1,
                    "sum_prefill_tokens": chunk,
                    "sum_prefill_kv_tokens": history,
                }
            if requests:
                scheduled |= {"num_decode_requests": requests, "sum_decode_kv_tokens": requests * context}
            truth: Any = library.estimate_forward_pass_time_ms({"scheduled_requests": scheduled})
            found.append(_milliseconds(oracle, chunk, history, requests, context) / truth - 1)
    print()
    for kind, found in errors.items():
        absolute = 100 * np.abs(found)
        median, p99, largest = np.percentile(absolute, [50, 99, 100])
        print(
            f"{system} TP{tensor_parallel} {kind:<8} |error| median {median:.3f} % P99 {p99:.2f} % max {largest:.2f} %"
        )
        name = f"{system} TP{tensor_parallel} {kind} steps, 600 of them"
        gates.source("synthesized pack against its library", "aiconfigurator-core 0.12.0")
        gates.check("synthesized pack against its library", f"{name}, median", median, at_most=0.3)
        gates.check("synthesized pack against its library", f"{name}, P99", p99, at_most=1.5)


# Signed error of the summed time. The library is known to be too fast; with more tensor parallelism more so.
@pytest.mark.parametrize("kind", ["raw", "corrected"])
@pytest.mark.parametrize(
    ("file", "config", "tensor_parallel", "at_most"),
    [
        ("codellama-34b-tp2-general.parquet", CODELLAMA_34B, 2, 5.0),
        ("llama-2-70b-hf-tp4-codegen.parquet", LLAMA_70B, 4, 12.0),
    ],
)
def test_decode_steps_lie_near_a_real_h100(
    file: str,
    config: Mapping[str, Any],
    tensor_parallel: int,
    at_most: float,
    kind: str,
    gates: Gates,
    data_folder: Path,
    tmp_path: Path,
) -> None:
    import pyarrow.parquet as pq

    steps = pq.read_table(data_folder / "blis_steps" / file).to_pydict()
    request = SynthesisRequest(
        system="h100_sxm",
        model_directory=_model(tmp_path / "model", config),
        tensor_parallel=tensor_parallel,
        vllm_version="0.15.1",
        corrections=kind == "corrected",
    )
    synthesis = synthesize(request)
    uncertainty = synthesis.uncertainty
    assert uncertainty is not None
    oracle = _oracle(request, tmp_path / "pack")
    order = sorted(range(len(steps["step.id"])), key=lambda row: steps["step.id"][row])
    real, answered, concurrency = [], [], []
    for row, following in pairwise(order):
        # A step lasts from its start to the start of the next; the file samples a tenth of all steps.
        consecutive = steps["step.id"][following] == steps["step.id"][row] + 1
        only_decode = not steps["batch.prefill_tokens"][row] and not steps["batch.prefill_tokens"][following]
        requests = steps["batch.num_decode_reqs"][row]
        if not (consecutive and only_decode and requests and steps["queue.running_depth"][row] == requests):
            continue
        blocks = steps["kv.blocks_total_gpu"][row] - steps["kv.blocks_free_gpu"][row]
        # The last block of a request is half full on average.
        context = max(1, blocks * 16 // requests - 8)
        real.append((steps["step.ts_start_ns"][following] - steps["step.ts_start_ns"][row]) / 1e6)
        answered.append(_milliseconds(oracle, 0, 0, requests, context))
        concurrency.append(requests)
    blocks = steps["kv.blocks_total_gpu"][0]
    what = f"{file.removesuffix('.parquet')}, {kind}"
    assert len(real) > 200
    for gate in ("synthesized pack against a real H100", "KV blocks by our formula"):
        gates.source(gate, "inference-sim/inference-sim @ 9293b22 (BLIS): steps of real vLLM 0.15.1 on H100")
    gate = "synthesized pack against a real H100"
    errors = 100 * (np.array(answered) / np.array(real) - 1)
    summed = 100 * (sum(answered) / sum(real) - 1)
    truths = [("summed time", len(real), summed), ("median", len(real), float(np.median(errors)))]
    truths += [
        (f"median at {low} to {high - 1} requests", len(chosen), float(np.median(chosen)))
        for low, high in pairwise(REQUESTS)
        if len(chosen := errors[(low <= np.array(concurrency)) & (np.array(concurrency) < high)]) >= LEAST_STEPS
    ]
    for name, count, error in truths:
        bound = at_most if name == "summed time" else None
        gates.check(gate, f"{what}, {count} steps, {name}; {uncertainty.verdict(error)}", error, at_most=bound)
    outside = [name for name, _, error in truths if not uncertainty.holds(error)]
    assert not outside
    if kind == "corrected":
        kv_error = 100 * (synthesis.kv_blocks / blocks - 1)
        gates.check("KV blocks by our formula", f"{synthesis.kv_blocks} for {blocks} logged", kv_error, at_most=2.0)
