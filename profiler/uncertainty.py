"""How far the truth may lie from a synthesized pack, from the few runs the tables could be held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from profiler.aiconfigurator import System

# Devices without NVLink whose second-level cache holds what the tables' benchmark read; one of them was compared.
_LARGE_CACHE: Final = ("l40s", "rtx_pro_6000_server")
# Operators at the speed of light lie so far below their own silicon (30 to 45 % were seen); a table taken from
# elsewhere is somewhere between the two.
_SPEED_OF_LIGHT_PERCENT: Final = 45.0


@dataclass(frozen=True)
class Uncertainty:
    """Truth / answer - 1 of a step's latency lies between these, in percent. No claim on TTFT under load."""

    low_percent: float
    high_percent: float
    basis: str

    def verdict(self, error_percent: float) -> str:
        """Where the truth is, as seen from an answer with this error (answer / truth - 1), and what was stated."""
        truth = truth_percent(error_percent)
        where = "inside" if self.holds(error_percent) else "OUTSIDE"
        return (
            f"truth {truth:+.1f} % from the answer, stated {self.low_percent:+g} to {self.high_percent:+g} %: {where}"
        )

    def holds(self, error_percent: float) -> bool:
        return self.low_percent <= truth_percent(error_percent) <= self.high_percent


def truth_percent(error_percent: float) -> float:
    """Truth / answer - 1 in percent, of answer / truth - 1 in percent."""
    return 100 * (100 / (100 + error_percent) - 1)


def uncertainty_of(
    system: System,
    tensor_parallel: int,
    *,
    has_link: bool,
    has_experts: bool,
    is_corrected: bool,
    is_transferred: bool,
) -> Uncertainty | None:
    """The statement for a pack: of what is known to be least sure of it, the largest miss first.

    Operators from another device's or shape's table widen it to where they may be at the speed of light. None where
    nothing like the device was compared with a run.
    """
    own = _of_own_tables(system, tensor_parallel, has_link=has_link, has_experts=has_experts, is_corrected=is_corrected)
    if own is None or not is_transferred:
        return own
    return Uncertainty(
        own.low_percent,
        own.high_percent + _SPEED_OF_LIGHT_PERCENT,
        "operators taken from another device or shape, compared with no run: up to 45 % for the speed of light beyond "
        f"what holds for own tables ({own.basis})",
    )


def _of_own_tables(
    system: System, tensor_parallel: int, *, has_link: bool, has_experts: bool, is_corrected: bool
) -> Uncertainty | None:
    if tensor_parallel > 1 and not system.has_nvlink and not has_link:
        return Uncertainty(
            30.0, 50.0, "tensor parallel over PCIe with the link of the tables' own machine; one box compared"
        )
    if has_experts:
        return Uncertainty(-20.0, 20.0, "mixture of experts: balanced routing is assumed")
    if system.name in _LARGE_CACHE:
        if is_corrected:
            return Uncertainty(
                -3.0,
                10.0,
                "PCIe device with a large L2, corrected; one RTX PRO 6000 run, which a correction was picked on",
            )
        return Uncertainty(10.0, 20.0, "PCIe device with a large L2, raw tables; one RTX PRO 6000 run")
    if not system.has_nvlink:
        return None
    if tensor_parallel > 2:
        return Uncertainty(0.0, 15.0, "NVLink, TP 4 to 8; Llama-2-70B TP4 on H100 and public Llama-70B rows")
    return Uncertainty(-5.0, 10.0, "NVLink, TP 1 to 2, asynchronous scheduling; CodeLlama-34B TP2 on H100")
