"""Gates: what the models promise on measured data, and the figures of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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


class Gates:
    """Collects the figures of one session. Owned by pytest's session; tests append."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

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
        """Record a figure, then fail where it exceeds its bound: the table shows it either way."""
        figure = Figure(gate, what, float(value), unit, at_most, dict(controls or {}))
        self.figures.append(figure)
        assert figure.held is not False, (
            f"{gate}: {what} is {value:+.2f} {unit}, at most {at_most:g} {unit} is promised"
        )
