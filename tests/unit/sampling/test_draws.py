"""The random function: the vectors of step.proto, kernel against Python, and how uniform it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from oracle_server.sampling import draws

VECTORS = Path(__file__).parents[2] / "data" / "random_vectors.json"


def test_the_values_in_the_comments_of_step_proto_hold() -> None:
    assert draws.mix(0) == 0xE220A8397B1DCDAF
    assert draws.text_hash("engine-0") == 0x0AE461FF625B65F6
    assert draws.engine_key(42, "engine-0") == 0x190D8D0B1A0866E7
    key = draws.engine_key(42, "engine-0")
    assert draws.draw(key, 0, 1, 0) == 0x401713C4524AC49F
    assert draws.draw(key, 1, 1, 0) == 0x279BB6F70C3754CB
    assert draws.draw(key, 1, 2, 0) == 0x208AF47EAFD04B50


def test_python_and_kernel_give_every_stored_vector() -> None:
    vectors = json.loads(VECTORS.read_text())["vectors"]
    assert len(vectors) >= 100
    for seed, engine_id, step_index, domain, ordinal, expected in vectors:
        key = draws.engine_key(int(seed), engine_id)
        assert draws.draw(key, int(step_index), domain, ordinal) == int(expected, 16)
        assert int(draws.draw_u64(draws.signed(key), draws.signed(int(step_index)), domain, ordinal)) == int(
            expected, 16
        )


def test_index_and_unit_of_the_kernel_equal_those_in_python() -> None:
    random = np.random.default_rng(5)
    values = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, *(int(v) for v in random.integers(0, 2**63, 2000))]
    for value in values:
        for size in (1, 2, 3, 7, 256, 1_000_003, 2**31):
            assert draws.index_below_u64(np.uint64(value), size) == draws.index_below(value, size) < size
        assert draws.unit_u64(np.uint64(value)) == draws.unit(value) < 1.0


def test_domains_give_independent_draws() -> None:
    # 2^14 pairs in 16 x 16 cells, 64 expected each. Chi-square with 255 degrees of freedom: 377 is passed by chance
    # once in a million seeds; a domain that leaks one of its four leading bits into another gives about 16,000.
    key = draws.engine_key(7, "engine-3")
    size = 1 << 14
    for first, second in ((1, 2), (1, 4), (2, 3), (0, 1)):
        cells = np.zeros((16, 16))
        for step in range(size):
            cells[draws.draw(key, step, first, 0) >> 60, draws.draw(key, step, second, 0) >> 60] += 1
        assert ((cells - size / 256) ** 2 / (size / 256)).sum() < 377


def test_a_fraction_is_the_same_for_all_ranks_of_a_server() -> None:
    whole = draws.fraction_draw("salt", "vllm-7:8000")
    assert 0.0 <= whole < 1.0
    assert {draws.fraction_draw("salt", f"vllm-7:8000/dp{rank}") for rank in range(20)} == {whole}
    assert draws.fraction_draw("other", "vllm-7:8000") != whole
    assert draws.fraction_draw("salt", "vllm-7:8000/dpx") != whole


@pytest.mark.parametrize("value", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_signed_keeps_the_bits(value: int) -> None:
    assert draws.signed(value) % 2**64 == value
    assert -(2**63) <= draws.signed(value) < 2**63
