"""A pack fitted to one workload's steps, replayed on workloads it has never seen; LLM-Emu's key on the same steps
beside it.

The truth is a composed pack (RTX PRO 6000, measured operators), so the function class favours physics: read the
distance between the two models, not the last digit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from accuracy.captures import ENGINE, LLM_EMU, Workload, capture, llm_emu_packs, lognormal, write_requests
from fleet import step_oracle
from gates import Gates
from replays import replay

pytestmark = [pytest.mark.accuracy, pytest.mark.slow, pytest.mark.nightly]

GATE = "workload shift, hybrid pack"
KV_BLOCKS = 35_000
BOUNDS = {"ttft": 10.0, "tpot": 5.0, "e2e": 5.0}
UNSEEN = {
    "long context": Workload(0.8, 60, lambda d: (d.randint(4000, 12000), lognormal(d, 200, 0.5, 16, 600))),
    "short chat": Workload(12.0, 300, lambda d: (lognormal(d, 90, 0.6, 8, 300), lognormal(d, 80, 0.6, 4, 300))),
    "reasoning": Workload(0.6, 50, lambda d: (lognormal(d, 200, 0.6, 16, 800), d.randint(1500, 5000))),
    "code": Workload(3.0, 200, lambda d: (lognormal(d, 1800, 0.7, 100, 7000), lognormal(d, 20, 0.8, 2, 120))),
}


@pytest.fixture(scope="module")
def config(data_folder: Path) -> Path:
    return data_folder / "llmservingsim" / "Llama-3.1-8B.config.json"


@pytest.fixture(scope="module")
def packs(data_folder: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The truth, the hybrid fitted to one workload's steps of it, and LLM-Emu's key on the same steps."""
    folder = tmp_path_factory.mktemp("shift")
    truth, hybrid = folder / "truth", folder / "hybrid"
    bundle = str(data_folder / "llmservingsim" / "RTXPRO6000-Llama-3.1-8B-tp1")
    blocks = ("--kv-blocks-assumed", str(KV_BLOCKS))
    model = ("--model-config", str(config))
    step_oracle("import", "llmservingsim", bundle, *model, "--tp", "1", *blocks, "-o", str(truth))
    trace = capture(truth, config, folder / "capture")
    device = ("--device", "NVIDIA RTX PRO 6000", "--device-memory-gib", "96")
    step_oracle("fit", str(trace), *device, *blocks, "-o", str(hybrid))
    return {"truth": truth, "hybrid": hybrid, **llm_emu_packs(trace, folder, KV_BLOCKS)}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_hybrid_pack_holds_on_workloads_it_was_not_fitted_to(
    name: str, packs: dict[str, Path], config: Path, tmp_path: Path, gates: Gates
) -> None:
    requests = write_requests(tmp_path / "requests.csv", name, UNSEEN[name])
    means = {}
    for pack, path in packs.items():
        document = replay(path, config, tmp_path, "--requests", str(requests), *ENGINE)
        means[pack] = {metric: document["metrics_ms"][metric]["mean"] for metric in BOUNDS}
    gates.source(GATE, "the truth is a composed pack, operators of RTX PRO 6000 by casys-kaist/LLMServingSim @ 5daddb2")
    for metric, at_most in BOUNDS.items():
        error = {pack: 100 * (means[pack][metric] / means["truth"][metric] - 1) for pack in packs}
        controls = {control: error[control] for control in LLM_EMU}
        gates.check(GATE, f"{name}: {metric.upper()} mean", error["hybrid"], at_most=at_most, controls=controls)
