"""Gates: what the models promise on measured data, and the figures of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "step_oracle.accuracy/1"
# Longer samples are kept as so many quantiles: a picture shows no more.
_VALUES_LIMIT = 500


@dataclass(frozen=True)
class Figure:
    """One measured figure beside its bound; a bound of None is reported only."""

    gate: str
    what: str
    value: float
    unit: str
    # |value| may be at most this.
    at_most: float | None
    controls: Mapping[str, float] = field(default_factory=dict)

    @property
    def held(self) -> bool | None:
        return None if self.at_most is None else abs(self.value) <= self.at_most


@dataclass(frozen=True)
class Curve:
    """One metric of one series, ascending: a line of a cumulative distribution."""

    gate: str
    metric: str
    unit: str
    series: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Points:
    """One metric of one series at several labelled points, measured and answered alike."""

    gate: str
    metric: str
    unit: str
    series: str
    values: Mapping[str, float]


@dataclass
class Record:
    """Everything a session measured, in the order of its tests. Pictures are drawn from its JSON alone."""

    figures: list[Figure] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    points: list[Points] = field(default_factory=list)
    # By gate: where the truth comes from.
    sources: dict[str, str] = field(default_factory=dict)
    # By file name: lines for people, as many as there are cases behind a figure.
    listings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: Record) -> None:
        self.figures += other.figures
        self.curves += other.curves
        self.points += other.points
        self.sources |= other.sources
        self.listings |= other.listings

    def document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "figures": [asdict(figure) | {"held": figure.held} for figure in self.figures],
            "curves": [asdict(curve) for curve in self.curves],
            "points": [asdict(points) for points in self.points],
            "sources": self.sources,
            "listings": self.listings,
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Record:
        if document.get("schema") != SCHEMA:
            raise ValueError(f"the schema is {document.get('schema')!r}; {SCHEMA} is needed: run `make accuracy`")
        figures = [Figure(**{k: v for k, v in entry.items() if k != "held"}) for entry in document["figures"]]
        curves = [Curve(**{**entry, "values": tuple(entry["values"])}) for entry in document["curves"]]
        points = [Points(**entry) for entry in document["points"]]
        return cls(figures, curves, points, dict(document["sources"]), dict(document.get("listings", {})))


class Gates:
    """Collects what one test measures. A figure beyond its bound fails the test at its end, so that all are shown."""

    def __init__(self) -> None:
        self.record = Record()

    def check(
        self,
        gate: str,
        what: str,
        value: float,
        *,
        at_most: float | None = None,
        unit: str = "%",
        controls: Mapping[str, float] | None = None,
    ) -> None:
        """A figure, its bound where one is promised, and the same figure of other models."""
        known = {name: float(control) for name, control in (controls or {}).items()}
        self.record.figures.append(Figure(gate, what, float(value), unit, at_most, known))

    def curve(self, gate: str, metric: str, values: Iterable[float], *, series: str, unit: str = "ms") -> None:
        """A line of the gate's picture of distributions; "measured" is drawn as the truth, the next series as ours."""
        self.record.curves.append(Curve(gate, metric, unit, series, _thinned(sorted(map(float, values)))))

    def points(self, gate: str, metric: str, values: Mapping[str, float], *, series: str, unit: str = "ms") -> None:
        """A series of the gate's picture of points, by label; "measured" is drawn as the truth, the next as ours."""
        rounded = {label: float(f"{value:.6g}") for label, value in values.items()}
        self.record.points.append(Points(gate, metric, unit, series, rounded))

    def source(self, gate: str, text: str) -> None:
        """Who measured the gate's truth; it stands under the gate's pictures."""
        self.record.sources[gate] = text

    def listing(self, name: str, lines: Iterable[str]) -> None:
        """The cases behind a gate's figures, one line each, written as `name`.txt."""
        self.record.listings[name] = list(lines)

    def assert_held(self) -> None:
        missed = [
            f"{figure.gate}: {figure.what} is {figure.value:+.2f} {figure.unit}, at most {figure.at_most:g} "
            f"{figure.unit} is promised"
            for figure in self.record.figures
            if figure.held is False
        ]
        assert not missed, "\n".join(missed)


def _thinned(ordered: Sequence[float]) -> tuple[float, ...]:
    if len(ordered) > _VALUES_LIMIT:
        last = len(ordered) - 1
        ordered = [ordered[round(i * last / (_VALUES_LIMIT - 1))] for i in range(_VALUES_LIMIT)]
    return tuple(float(f"{value:.6g}") for value in ordered)
