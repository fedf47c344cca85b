"""Real H100 steps (BLIS, vLLM 0.15.1): the hybrid model on regions it has not seen, beside three other models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gates import Gates
from profiler.hybrid_fit import FitOptions, fit_hybrid, physics
from profiler.hybrid_samples import StepSamples, read_samples

pytestmark = pytest.mark.accuracy

Reals = NDArray[np.float64]
# File, hole in concurrency (inclusive), concurrency above which is extrapolation.
RUNS = {
    "codellama-34b TP2 general": ("codellama-34b-tp2-general.parquet", (32, 80), 80),
    "llama-2-70b TP4 codegen": ("llama-2-70b-hf-tp4-codegen.parquet", (26, 45), 45),
}
OPTIONS = FitOptions(max_context_known=False)
# Percent, mean absolute error of a step.
GATES = {"in distribution": 2.5, "hole": 2.5, "extrapolated": 4.0}


@pytest.mark.parametrize("run", RUNS)
def test_hybrid_predicts_real_steps_of_regions_it_has_not_seen(run: str, data_folder: Path, gates: Gates) -> None:
    name, hole, edge = RUNS[run]
    steps = read_samples(data_folder / "blis_steps" / name).steps
    concurrency = steps.decode_requests + steps.chunks
    fold = np.arange(len(steps)) // 10 % 5
    regions = {
        # Ten consecutive steps stay together: neighbours in time are near-duplicates.
        "in distribution": [fold == number for number in range(5)],
        "hole": [(concurrency >= hole[0]) & (concurrency <= hole[1])],
        "extrapolated": [concurrency > edge],
    }
    figures = {}
    print(f"\n{run}, {len(steps)} steps; MAPE in percent")
    for region, parts in regions.items():
        errors: dict[str, list[Reals]] = {model: [] for model in MODELS}
        for held_out in parts:
            train, test = steps.take(~held_out), steps.take(held_out)
            for model, predict in MODELS.items():
                errors[model].append(np.abs(predict(train, test) / test.latency_ns - 1))
        figures[region] = {model: 100 * float(np.concatenate(found).mean()) for model, found in errors.items()}
        print(f"  {region:<16} " + "  ".join(f"{model} {value:.2f}" for model, value in figures[region].items()))
    gates.source("BLIS H100 steps", "inference-sim/inference-sim @ 9293b22 (BLIS): steps of real vLLM 0.15.1 on H100")
    for region, values in figures.items():
        hybrid = values.pop("hybrid")
        gates.check("BLIS H100 steps", f"{run}: MAPE {region}", hybrid, at_most=GATES[region], controls=values)


def test_dispatch_time_is_not_mistaken_for_the_step(data_folder: Path) -> None:
    """`step.duration_us` is about 2 % of a step; a fit to it would be 40 times too fast."""
    steps = read_samples(data_folder / "blis_steps" / "codellama-34b-tp2-general.parquet").steps
    assert 12e6 < np.median(steps.latency_ns) < 20e6


def _hybrid(train: StepSamples, test: StepSamples) -> Reals:
    return fit_hybrid(train, OPTIONS).predict(test)


def _physics(train: StepSamples, test: StepSamples) -> Reals:
    return physics(test, fit_hybrid(train, OPTIONS).terms, ())


def _llm_emu_auto(train: StepSamples, test: StepSamples) -> Reals:
    """LLM-Emu's key, K = auto: buckets of (total tokens, concurrency) in a table of decode and one of prefill steps,
    pooled from the nearest until they hold 32 samples; the expected value of its Shepard draw."""
    return _llm_emu_key(train, test, least_samples=32)


def _llm_emu_k1(train: StepSamples, test: StepSamples) -> Reals:
    """The same with K = 1: the nearest tokens, then the nearest concurrency, and that bucket alone."""
    return _llm_emu_key(train, test, least_samples=0)


def _llm_emu_key(train: StepSamples, test: StepSamples, least_samples: int) -> Reals:
    predicted = np.zeros(len(test))
    for mixed in (False, True):
        rows = test.mixed == mixed
        known, asked = _key(train.take(train.mixed == mixed)), _key(test.take(rows))
        latency = train.latency_ns[train.mixed == mixed]
        buckets, bucket = np.unique(known, axis=0, return_inverse=True)
        bucket = bucket.ravel()
        count = np.bincount(bucket)
        mean = np.bincount(bucket, latency) / count
        span = np.maximum(1, buckets.max(axis=0) - buckets.min(axis=0))
        values = []
        for point in asked:
            if not least_samples:
                values.append(mean[np.lexsort(np.abs(buckets - point).T[::-1])[0]])
                continue
            square = (((buckets - point) / span) ** 2).sum(axis=1)
            order = np.argsort(square, kind="stable")
            if square[order[0]] == 0:
                values.append(mean[order[0]])
                continue
            taken = order[: 1 + int(np.searchsorted(np.cumsum(count[order]), least_samples))]
            values.append(np.average(mean[taken], weights=1 / square[taken]))
        predicted[rows] = values
    return predicted


def _neighbours(train: StepSamples, test: StepSamples) -> Reals:
    """Eight nearest by inverse distance on logarithms of all features."""
    known, asked = _features(train), _features(test)
    square = ((asked[:, None, :] - known[None, :, :]) ** 2).sum(axis=2)
    nearest = np.argsort(square, axis=1)[:, :8]
    weights = 1 / (np.sqrt(np.take_along_axis(square, nearest, axis=1)) + 1e-3)
    return np.asarray((weights * train.latency_ns[nearest]).sum(axis=1) / weights.sum(axis=1))


def _boosted_trees(train: StepSamples, test: StepSamples) -> Reals:
    from sklearn.ensemble import HistGradientBoostingRegressor

    trees = HistGradientBoostingRegressor(max_iter=200, learning_rate=0.05, min_samples_leaf=10, random_state=0)
    trees.fit(_features(train), np.log(train.latency_ns))
    return np.asarray(np.exp(trees.predict(_features(test))))


def _key(steps: StepSamples) -> NDArray[np.int64]:
    return np.stack((steps.prefill_tokens + steps.decode_tokens, steps.decode_requests + steps.chunks), axis=1)


def _features(steps: StepSamples) -> Reals:
    columns = (
        steps.prefill_tokens + steps.decode_tokens,
        steps.decode_requests,
        steps.context_tokens,
        steps.prefill_tokens,
        steps.chunks,
        steps.pairs,
    )
    return np.log1p(np.stack(columns, axis=1))


MODELS: dict[str, Callable[[StepSamples, StepSamples], Reals]] = {
    "hybrid": _hybrid,
    "physics alone": _physics,
    "LLM-Emu auto": _llm_emu_auto,
    "LLM-Emu K=1": _llm_emu_k1,
    "nearest neighbours": _neighbours,
    "boosted trees": _boosted_trees,
}
