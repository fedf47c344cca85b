"""How far the truth may lie from a synthesized pack, from the few runs the tables could be held against."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.aiconfigurator import System


@dataclass(frozen=True)
class Uncertainty:
    """Truth / answer - 1 of a step's latency lies between these, in percent. No claim on TTFT under load."""

    low_percent: float
    high_percent: float
    basis: str


def uncertainty_of(
    system: System,
    tensor_parallel: int,
    *,
    has_link: bool,
    has_experts: bool,
    is_corrected: bool,
    is_transferred: bool,
) -> Uncertainty:
    """The widest statement that applies; the bias is one-sided (the tables are too fast)."""
    if is_transferred:
        return Uncertainty(0.0, 45.0, "operators taken from another device or shape; compared with no run")
    if tensor_parallel > 1 and not system.has_nvlink and not has_link:
        return Uncertainty(
            30.0, 50.0, "tensor parallel over PCIe with the link of the tables' own machine; one box compared"
        )
    if has_experts:
        return Uncertainty(-20.0, 20.0, "mixture of experts: balanced routing is assumed")
    if not system.has_nvlink:
        if is_corrected:
            return Uncertainty(-3.0, 10.0, "PCIe device with a large L2, corrected; one RTX PRO 6000 run")
        return Uncertainty(10.0, 20.0, "PCIe device with a large L2, raw tables; one RTX PRO 6000 run")
    if tensor_parallel > 2:
        return Uncertainty(0.0, 15.0, "NVLink, TP 4 to 8; Llama-2-70B TP4 on H100 and public Llama-70B rows")
    return Uncertainty(-5.0, 10.0, "NVLink, TP 1 to 2, asynchronous scheduling; CodeLlama-34B TP2 on H100")
