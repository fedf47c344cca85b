"""What a synthesized pack states about itself: one row per kind of pack, and nothing where nothing was compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from profiler.aiconfigurator import System
from profiler.uncertainty import Uncertainty, truth_percent, uncertainty_of

NVLINK, PCIE = 450e9, 64e9


def stated(name: str, bytes_per_s: float, tensor_parallel: int = 1, **changes: Any) -> Uncertainty | None:
    system = System(name, "0.24.0", name, 80 << 30, (9, 0), bytes_per_s, Path())
    facts = {"has_link": False, "has_experts": False, "is_corrected": True, "is_transferred": False}
    return uncertainty_of(system, tensor_parallel, **{**facts, **changes})


@pytest.mark.parametrize(
    ("name", "bytes_per_s", "tensor_parallel", "changes", "width"),
    [
        ("h100_sxm", NVLINK, 1, {}, (-5, 10)),
        ("h100_sxm", NVLINK, 2, {"is_corrected": False}, (-5, 10)),
        ("h100_sxm", NVLINK, 4, {}, (0, 15)),
        ("h100_sxm", NVLINK, 8, {}, (0, 15)),
        ("rtx_pro_6000_server", PCIE, 1, {}, (-3, 10)),
        ("l40s", PCIE, 1, {}, (-3, 10)),
        ("rtx_pro_6000_server", PCIE, 1, {"is_corrected": False}, (10, 20)),
        ("rtx_pro_6000_server", PCIE, 2, {"has_link": True}, (-3, 10)),
        ("rtx_pro_6000_server", PCIE, 2, {}, (30, 50)),
        ("b60", PCIE, 2, {}, (30, 50)),
        ("h100_sxm", NVLINK, 8, {"has_experts": True}, (-20, 20)),
        ("rtx_pro_6000_server", PCIE, 2, {"has_experts": True}, (30, 50)),
        ("h100_sxm", NVLINK, 1, {"is_transferred": True}, (-5, 55)),
        ("rtx_pro_6000_server", PCIE, 2, {"is_transferred": True}, (30, 95)),
    ],
)
def test_each_kind_of_pack_states_its_width(
    name: str, bytes_per_s: float, tensor_parallel: int, changes: dict[str, Any], width: tuple[float, float]
) -> None:
    uncertainty = stated(name, bytes_per_s, tensor_parallel, **changes)
    assert uncertainty is not None
    assert (uncertainty.low_percent, uncertainty.high_percent) == width


@pytest.mark.parametrize("is_transferred", [False, True])
def test_a_device_unlike_any_compared_one_states_nothing(is_transferred: bool) -> None:
    assert stated("b60", PCIE, is_transferred=is_transferred) is None


def test_the_truth_is_seen_from_the_answer() -> None:
    """An answer 20 % too fast: the truth is 25 % above it."""
    assert truth_percent(-20.0) == pytest.approx(25.0)
    statement = Uncertainty(10.0, 25.0, "")
    assert statement.holds(-19.9)
    assert not statement.holds(-20.1)
    assert not statement.holds(-9.0)
    assert statement.verdict(-15.0) == "truth +17.6 % from the answer, stated +10 to +25 %: inside"
    assert statement.verdict(0.0).endswith("truth +0.0 % from the answer, stated +10 to +25 %: OUTSIDE")
