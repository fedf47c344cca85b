"""The shim's random function equals the published vectors, and the server's."""

import json
import random
from pathlib import Path

import pytest

from oracle_server.sampling.draws import draw, engine_key
from vllm_shim.draws import StepDraws, text_hash

VECTORS = Path(__file__).parents[2] / "data" / "random_vectors.json"


def test_every_published_vector_of_a_step_is_reproduced() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]
    of_steps = [vector for vector in vectors if vector[4] == 0]
    assert len(of_steps) == 400
    for seed, engine_id, step_index, domain, _, expected in of_steps:
        draws = StepDraws(engine_key(int(seed), engine_id), domain)
        assert f"0x{draws.of(int(step_index)):016X}" == expected


def test_the_vectors_in_the_proto_comments_hold() -> None:
    assert text_hash("engine-0") == 0x0AE461FF625B65F6
    assert StepDraws(0x190D8D0B1A0866E7, 2).of(1) == 0x208AF47EAFD04B50


@pytest.mark.parametrize("key", [0, 1, (1 << 64) - 1, engine_key(42, "engine-0")])
def test_draws_of_many_steps_are_those_of_each(key: int) -> None:
    """In order, with gaps, back again, and at both ends of what a step index may be."""
    steps, draws, step_index = random.Random(3), StepDraws(key, 1), 0
    for _ in range(2_000):
        step_index = max(0, step_index + steps.choice((1, 1, 1, 1, 2, 7, -3, 127, 128, 129, 100_000)))
        assert draws.of(step_index) == draw(key, step_index, 1, 0)
    for step_index in (0, (1 << 63) - 1, (1 << 64) - 1):
        assert draws.of(step_index) == draw(key, step_index, 1, 0)
