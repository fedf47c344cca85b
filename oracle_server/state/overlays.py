"""What the overlays of a binding make of one engine's steps.

Constant factors are one number. Whatever changes from step to step is a Schedule, a pure function of the engine's key,
step_index and the device time the step carries (step_oracle.v1.Overlay has the formulas).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from oracle_server.sampling import draws
from oracle_server.state.binding import Overlay
from oracle_server.state.identity import EngineIdentity, in_share, is_named

NS_PER_HOUR = 3.6e12


class Effect(NamedTuple):
    """What the active overlays do to one step."""

    # On the latency, without the constant factors.
    factor: float
    stall_ns: int
    is_error: bool


class Schedule:
    """Immutable: the overlays of one engine that are no constant factor, each with its place in the binding."""

    __slots__ = ("_key", "_overlays", "_time_scale")

    def __init__(self, overlays: Sequence[tuple[int, Overlay]], key: int, time_scale: float) -> None:
        self._overlays = tuple(overlays)
        self._key = key
        self._time_scale = time_scale

    def at(self, step_index: int, device_time_ns: int) -> Effect:
        """What they do to one step."""
        factor, stall_ns, is_error = 1.0, 0, False
        for place, overlay in self._overlays:
            if not _is_active(overlay, step_index, device_time_ns):
                continue
            factor *= overlay.slow_down_factor
            if overlay.degradation_per_hour:
                hours = (device_time_ns - overlay.begin_device_time_ns) / NS_PER_HOUR
                factor *= 1.0 + overlay.degradation_per_hour * hours
            if self._is_drawn(step_index, 2 * place, overlay.stall_every_steps):
                stall_ns += scaled(overlay.stall_ns, self._time_scale)
            is_error = is_error or self._is_drawn(step_index, 2 * place + 1, overlay.error_every_steps)
        return Effect(factor, stall_ns, is_error)

    def _is_drawn(self, step_index: int, ordinal: int, every_steps: int) -> bool:
        if not every_steps:
            return False
        draw = draws.draw(self._key, step_index, draws.DOMAIN_FAULT, ordinal)
        return draws.index_below(draw, every_steps) == 0


def effects_of(
    overlays: Sequence[Overlay], identity: EngineIdentity, key: int, time_scale: float
) -> tuple[float, Schedule | None]:
    """(Product of the constant slow-downs that touch the engine, everything else that does; None where nothing does).

    `key` is that of the engine's draws; stalls are times, so `time_scale` multiplies them.
    """
    constant = 1.0
    others: list[tuple[int, Overlay]] = []
    for place, overlay in enumerate(overlays):
        if not touches(overlay, identity):
            continue
        if _is_constant(overlay):
            constant *= overlay.slow_down_factor
        else:
            others.append((place, overlay))
    return constant, Schedule(others, key, time_scale) if others else None


def touches(overlay: Overlay, identity: EngineIdentity) -> bool:
    """True where every condition the overlay gives holds for the engine."""
    if overlay.engine_ids and not is_named(overlay.engine_ids, identity):
        return False
    return in_share(overlay.labels, overlay.fraction, overlay.fraction_salt, identity)


def scaled(value_ns: int, scale: float) -> int:
    """floor(value x scale + 0.5): what a factor on a time means everywhere."""
    return value_ns if scale == 1.0 else math.floor(value_ns * scale + 0.5)


def _is_constant(overlay: Overlay) -> bool:
    return not (
        overlay.stall_every_steps
        or overlay.error_every_steps
        or overlay.degradation_per_hour
        or overlay.begin_step_index
        or overlay.end_step_index
        or overlay.begin_device_time_ns
        or overlay.end_device_time_ns
    )


def _is_active(overlay: Overlay, step_index: int, device_time_ns: int) -> bool:
    return (
        overlay.begin_step_index <= step_index
        and overlay.begin_device_time_ns <= device_time_ns
        and (not overlay.end_step_index or step_index < overlay.end_step_index)
        and (not overlay.end_device_time_ns or device_time_ns < overlay.end_device_time_ns)
    )
