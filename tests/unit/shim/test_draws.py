"""The pure-Python random function equals the published vectors."""

import json
from pathlib import Path

from vllm_shim.draws import draw, engine_key, mix, text_hash

VECTORS = Path(__file__).parents[2] / "data" / "random_vectors.json"


def test_every_published_vector_is_reproduced() -> None:
    vectors = json.loads(VECTORS.read_text(encoding="utf-8"))["vectors"]
    assert len(vectors) == 800
    for seed, engine_id, step_index, domain, ordinal, expected in vectors:
        assert f"0x{draw(engine_key(int(seed), engine_id), int(step_index), domain, ordinal):016X}" == expected


def test_the_vectors_in_the_proto_comments_hold() -> None:
    assert mix(0) == 0xE220A8397B1DCDAF
    assert text_hash("engine-0") == 0x0AE461FF625B65F6
    assert engine_key(42, "engine-0") == 0x190D8D0B1A0866E7
    assert draw(engine_key(42, "engine-0"), 1, 2, 0) == 0x208AF47EAFD04B50
