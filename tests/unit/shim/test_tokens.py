"""Synthetic tokens: no pattern repeats, no stop string appears, a grammar gets a legal token."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_shim.step_shape import RequestState, ScheduledRequest, ScheduledStep
from vllm_shim.tokens import SEQUENCE, TokenSource

EOS = 2


class LetterTokenizer:
    """Ids 0-2 special, then every printable ASCII character, then the words of three letters over `abcdefgh`."""

    all_special_ids = (0, 1, 2)

    def __init__(self) -> None:
        letters = "abcdefgh"
        self.texts = ["<a>", "<b>", "<eos>", *map(chr, range(32, 127))]
        self.texts += [f" {x}{y}{z}" for x in letters for y in letters for z in letters]

    def __len__(self) -> int:
        return len(self.texts)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts[token] for token in ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [self.texts.index(character) for character in text]


TOKENIZER = LetterTokenizer()


def request(key: str = "r", **changes: Any) -> RequestState:
    values = {
        "stop": None,
        "allowed_token_ids": None,
        "all_stop_token_ids": {EOS},
        "bad_words_token_ids": None,
        "eos_token_id": EOS,
    }
    return RequestState(key, key, 5, SimpleNamespace(**values | changes), None)


def source() -> TokenSource:
    return TokenSource(TOKENIZER, len(TOKENIZER))


def text(state: RequestState, count: int = 300) -> str:
    tokens = source()
    return TOKENIZER.decode([tokens.filler(state, i) for i in range(count)])


def test_no_pattern_ever_repeats_back_to_back() -> None:
    tokens = source()
    for key in ("a", "b", "request-17"):
        state = request(key)
        ids = [tokens.filler(state, i) for i in range(400)]
        for length in range(1, 60):
            for start in range(len(ids) - 2 * length):
                assert ids[start : start + length] != ids[start + length : start + 2 * length]


def test_no_pattern_repeats_wherever_an_output_begins_and_however_few_tokens_are_allowed() -> None:
    tokens = source()
    state = request(allowed_token_ids=[10, 11, 12])
    tokens.fillers(state)
    for offset in (0, (1 << 16) - 60, (1 << 16) - 1):
        state.filler_offset = offset
        ids = [tokens.filler(state, i) for i in range(300)]
        for length in range(1, 100):
            for start in range(len(ids) - 2 * length):
                assert ids[start : start + length] != ids[start + length : start + 2 * length], (offset, length, start)


def test_an_output_of_half_a_million_tokens_does_not_reach_the_end_of_the_sequence() -> None:
    tokens = source()
    for key in map(str, range(1000)):
        state = request(key)
        tokens.fillers(state)
        assert state.filler_offset + 500_000 < SEQUENCE


def test_requests_with_stop_strings_of_their_own_keep_no_sequence_each() -> None:
    tokens = source()
    kept = {id(tokens.fillers(request(str(i), stop=f"stop{i}"))) for i in range(600)}
    assert len(tokens._fillers_of) <= 256
    assert len(kept) > 100
    assert {len(fillers) for fillers in tokens._fillers_of.values()} == {96}


def test_the_same_key_gives_the_same_text_and_another_key_another() -> None:
    assert text(request("a")) == text(request("a"))
    assert text(request("a")) != text(request("b"))


@pytest.mark.parametrize("stop", ["ab", "a", " ", "h", ["ab", "cd", "e"], "\n", "abcdefgh"])
def test_no_stop_string_appears(stop: str | list[str]) -> None:
    produced = text(request(stop=stop))
    for forbidden in [stop] if isinstance(stop, str) else stop:
        assert forbidden not in produced


def test_stop_ids_and_bad_words_are_never_emitted() -> None:
    tokens = source()
    banned = {TOKENIZER.texts.index(" abc"), TOKENIZER.texts.index(" aaa")}
    state = request(all_stop_token_ids=banned | {EOS}, bad_words_token_ids=[[TOKENIZER.texts.index(" bbb")]])
    produced = {tokens.filler(state, i) for i in range(3000)}
    assert not produced & (banned | {EOS, TOKENIZER.texts.index(" bbb")})


def test_allowed_token_ids_bind() -> None:
    tokens = source()
    state = request(allowed_token_ids=[10, 11, 12, 13])
    assert {tokens.filler(state, i) for i in range(200)} == {10, 11, 12, 13}


def test_without_a_tokenizer_ids_come_from_the_middle_of_the_vocabulary() -> None:
    tokens = TokenSource(None, 1000)
    assert {tokens.filler(request(), i) for i in range(500)} <= set(range(500, 596))


def mask(*allowed: int, size: int = 32 * 20) -> np.ndarray:
    bits = np.zeros(size, bool)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)[None, :]


def legal(bitmask: np.ndarray, ids: list[str], drafts: dict[str, list[int]] | None = None) -> dict[str, int]:
    step = ScheduledStep(
        SimpleNamespace(),  # type: ignore[arg-type]
        [ScheduledRequest(request(name), 0, (drafts or {}).get(name)) for name in ids],
    )
    grammar = SimpleNamespace(structured_output_request_ids=ids, grammar_bitmask=bitmask)
    return source().legal(grammar, step)


def index(character: str) -> int:
    return TOKENIZER.texts.index(character)


def test_a_grammar_that_may_end_ends() -> None:
    assert legal(mask(EOS, index("}"), index(",")), ["r"]) == {"r": EOS}


def test_a_string_is_closed_before_it_grows() -> None:
    assert legal(mask(*range(3, 98)), ["r"]) == {"r": index('"')}


def test_an_object_is_closed_before_it_grows() -> None:
    assert legal(mask(index(" "), index(","), index("}")), ["r"]) == {"r": index("}")}


def test_whitespace_is_the_last_resort() -> None:
    assert legal(mask(index(" ")), ["r"]) == {"r": index(" ")}


def test_rows_belong_to_the_right_request_with_and_without_padding() -> None:
    rows = [mask(index(c)) for c in "abcd"]
    packed = np.concatenate(rows)
    # Up to 0.25: as many rows as drafts and one more; from 0.32 on a fixed block per request.
    assert legal(packed, ["x", "y"], {"x": [9, 9]}) == {"x": index("a"), "y": index("d")}
    assert legal(packed, ["x", "y"]) == {"x": index("a"), "y": index("c")}


def test_a_grammar_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="allows no token"):
        legal(mask(), ["r"])
