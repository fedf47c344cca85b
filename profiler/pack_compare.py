"""Two packs side by side, region by region: how far apart their answers are, and against what spread."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from oracle_server import pack
from oracle_server.sampling.answer import SUPPORT_EXTRAPOLATED
from oracle_server.sampling.shape import StepQuery
from profiler.capture.evaluate import draws
from profiler.capture.regions import region_of, region_order

_REQUESTS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXT: Final = (64, 256, 1024, 4096, 16384)
_PREFILL: Final = (16, 64, 256, 1024, 4096, 8192)
# A shape that moved by more counts as moved.
_MOVED: Final = 0.05


@dataclass(frozen=True)
class RegionChange:
    """B against A over the shapes of one region that both have data for.

    `effect` is the difference of means in standard deviations of the answers (Cohen's d, both packs pooled), its median
    over the shapes, infinite where neither scatters; `moved_share` counts shapes whose mean moved by more than 5 %.
    Changes in percent of A.
    """

    region: str
    shapes: int
    change: float
    smallest: float
    largest: float
    effect: float
    moved_share: float


@dataclass(frozen=True)
class Comparison:
    """`fields`: manifest fields that differ, name to both values; `left_out`: shapes that one of them extrapolates."""

    a: str
    b: str
    fields: dict[str, tuple[str, str]]
    regions: tuple[RegionChange, ...]
    left_out: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an effect without scatter is null."""
        document = asdict(self)
        for region in document["regions"]:
            if np.isinf(region["effect"]):
                region["effect"] = None
        return document


def compare_packs(a: Path, b: Path) -> Comparison:
    """Ask both packs about one grid of shapes. Raises PackInvalid."""
    with tempfile.TemporaryDirectory() as scratch:
        reports, oracles = [], []
        for number, directory in enumerate((a, b)):
            compiled = Path(scratch) / str(number)
            reports.append(pack.compile_pack(directory, compiled))
            oracles.append(pack.open_oracle(pack.load_compiled(compiled)))
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        left_out = 0
        for number, query in enumerate(_shapes()):
            (ours, support), (theirs, other) = (draws(oracle, query, number * 1000) for oracle in oracles)
            if SUPPORT_EXTRAPOLATED in (support, other):
                left_out += 1
                continue
            spread = float(np.sqrt((ours.var() + theirs.var()) / 2))
            difference = float(theirs.mean() - ours.mean())
            effect = difference / spread if spread else float(np.copysign(np.inf, difference))
            found[region_of(query)].append((difference / float(ours.mean()), effect))
    manifests = [report.manifest for report in reports]
    return Comparison(
        a=manifests[0].name,
        b=manifests[1].name,
        fields=_differing_fields(*manifests),
        regions=tuple(_change(region, found[region]) for region in sorted(found, key=region_order)),
        left_out=left_out,
    )


def _change(region: str, shapes: list[tuple[float, float]]) -> RegionChange:
    change, effect = np.array(shapes).T
    # No difference over no spread is no effect.
    effect = np.where(change == 0, 0.0, effect)
    return RegionChange(
        region=region,
        shapes=len(shapes),
        change=float(100 * np.median(change)),
        smallest=float(100 * change.min()),
        largest=float(100 * change.max()),
        # One of the effects, not between two: between infinities of both signs is no number.
        effect=float(np.sort(effect)[(len(effect) - 1) // 2]),
        moved_share=float((np.abs(change) > _MOVED).mean()),
    )


def _shapes() -> Iterator[StepQuery]:
    for requests in _REQUESTS:
        for each in _CONTEXT:
            yield StepQuery((), (), requests, requests, requests * each, each, requests, 0, 0)
    for prefill in _PREFILL:
        for requests in (0, *_REQUESTS):
            each = 256 if requests else 0
            yield StepQuery((prefill,), (0,), requests, requests, requests * each, each, requests + 1, 0, 1)


def _differing_fields(a: pack.Manifest, b: pack.Manifest) -> dict[str, tuple[str, str]]:
    names = ("kind", "model", "device", "parallel", "engine", "kv_cache")
    differing: dict[str, tuple[str, str]] = {}
    for name in names:
        ours, theirs = getattr(a, name), getattr(b, name)
        for field in getattr(ours, "__struct_fields__", ("",)):
            values = [str(getattr(value, field) if field else value) for value in (ours, theirs)]
            if values[0] != values[1]:
                differing[f"{name}.{field}".rstrip(".")] = (values[0], values[1])
    return differing
