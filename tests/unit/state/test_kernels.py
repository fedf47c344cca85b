"""Once the server is ready, no step compiles anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from builders import build_composed_pack, build_hybrid_pack, build_sampled_pack, decode_query, mixed_query
from oracle_server import pack as packs
from oracle_server.sampling import composed_kernels, hybrid_kernels, joint
from oracle_server.state.kernels import warm_kernels


def compiled_variants() -> int:
    kernels: list[Any] = [
        composed_kernels.decode_latency,
        composed_kernels.decode_piece,
        composed_kernels.mixed_latency,
        hybrid_kernels.decode_latency,
        hybrid_kernels.decode_piece,
        hybrid_kernels.mixed_latency,
        joint.draw_sample,
    ]
    return sum(len(kernel.signatures) for kernel in kernels)


@pytest.mark.parametrize("build", [build_composed_pack, build_sampled_pack, build_hybrid_pack])
def test_answers_of_a_mapped_pack_use_the_warm_variants(build: object, tmp_path: Path) -> None:
    build(tmp_path / "pack")  # type: ignore[operator]
    packs.compile_pack(tmp_path / "pack", tmp_path / "compiled")
    warm_kernels()
    warm = compiled_variants()
    oracle = packs.open_oracle(packs.load_compiled(tmp_path / "compiled"))
    for key, step_index in ((0, 0), (2**64 - 1, 2**63 - 1), (2**63, 1)):
        oracle.answer(decode_query(4, 400), key, step_index, 1.5)
        oracle.answer(decode_query(4, 400, tokens=9), key, step_index)
        oracle.answer(mixed_query([(5, 0), (7, 3)], requests=2, context=9), key, step_index)
    assert compiled_variants() == warm
