"""Packs synthesized from AIConfigurator's tables against a whole real run, raw and corrected, with the stated
uncertainty.

The same 300 requests and the same engine as tests/accuracy/test_replayed_runs.py; the RTX PRO 6000 is the device on
which the tables are known to be worst (aiconfigurator-core 0.12.0: attention without an L2 flush, nothing measured in
mixed batches). Only the raw pack is judged blind: the corrected one's `mixed_decode_factor` of 2.0 was picked from 1.6
and 2.0 on this very run, and its skew of 0.04 is from the operator tables of this device and another one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleet import step_oracle
from gates import Gates
from profiler.uncertainty import Uncertainty
from replays import MEASURED_RUNS, replay

pytestmark = [pytest.mark.accuracy, pytest.mark.slow, pytest.mark.nightly]
pytest.importorskip("aiconfigurator_core", reason="the `synthesize` extra is not installed")


RAW, CORRECTED = "raw", "corrected, not blind: a correction was picked on this run"


@pytest.mark.parametrize("kind", [RAW, CORRECTED], ids=["raw", "corrected"])
def test_a_synthesized_pack_replays_the_real_run_within_its_uncertainty(
    kind: str, data_folder: Path, tmp_path: Path, gates: Gates
) -> None:
    run = MEASURED_RUNS["RTX PRO 6000"]
    model, pack = tmp_path / "llama-3.1-8b", tmp_path / "pack"
    model.mkdir()
    (model / "config.json").write_bytes(run.model_config(data_folder).read_bytes())
    flag = "--no-corrections" if kind == RAW else "--corrections"
    blocks = ("--kv-blocks", "35000", "--kv-blocks-basis", "assumed")
    step_oracle("synthesize", "--system", "rtx_pro_6000_server", "--model", str(model), *blocks, flag, "-o", str(pack))
    real = ("--requests", str(run.requests(data_folder)), "--real-run", str(run.folder(data_folder)))
    document = replay(pack, model, tmp_path, *real)
    uncertainty = Uncertainty(**json.loads((pack / "manifest.json").read_text())["uncertainty"])
    gate = f"AIConfigurator pack, PRO 6000 run, {kind}"
    gates.source(gate, "casys-kaist/LLMServingSim @ 5daddb2: 300 requests on real vLLM 0.19, Llama-3.1-8B")
    for metric in ("ttft", "tpot", "e2e"):
        error = document["error_percent"][metric]["mean"]
        what = f"{metric.upper()} mean; {uncertainty.verdict(error)}"
        gates.check(gate, what, error)
        # The pack makes no claim on TTFT under load.
        assert uncertainty.holds(error) or metric == "ttft", what
