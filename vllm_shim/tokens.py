"""Synthetic tokens that trip nothing: no stop string, no repetition detection, no grammar.

Filler tokens come in three disjoint classes, and which class comes next follows a square-free sequence over three
letters: no pattern ever repeats back to back, whatever repetition detection a user enables. Fillers are plain words
where the tokenizer has them; for a request with stop strings, words with the rarest letter of each stop string are left
out, so none can be spelled.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_shim.draws import text_hash

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import GrammarOutput

    from vllm_shim.step_shape import DecodeStep, RequestState, ScheduledStep

_WORD = re.compile(r" [a-z]{2,9}")
_PRINTABLE = re.compile(r"[A-Za-z0-9]+")
_CLASS_TOKENS = 32
_LEAST_TOKENS = 3
_SEARCHED_TOKENS = 20_000
# Kept sets of fillers, one for each combination of stop strings, allowed and banned tokens.
_REMEMBERED = 256
# Places of the square-free sequence, and those of them where an output may begin: only an output of more than 983,040
# tokens goes over the end, where a pattern may repeat.
SEQUENCE = 1 << 20
_BEGINNINGS = 1 << 16
# Under a grammar: the character that ends things soonest comes first, so that an unbounded schema still closes. A quote
# opens a key or ends a string; inside a string brackets are content, so they come after it.
_CLOSERS = '"}],:{[1234567890abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_.+/()<>=!?;%&*#@'


class TokenSource:
    """Chooses synthetic tokens for one engine. Engine thread only; immutable but for its caches."""

    def __init__(self, tokenizer: Any | None, vocab_size: int) -> None:
        """`tokenizer` None (skip_tokenizer_init).

        Ids from the middle of the vocabulary, nothing can be promised about text.
        """
        self.vocab_size = vocab_size
        self.usual, self._texts = _filler_words(tokenizer, vocab_size)
        self._grammar_order = _grammar_order(tokenizer)
        # At each place of the sequence the number of a filler, for all requests.
        self.numbers = _numbers()
        self._fillers_of: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def filler(self, state: RequestState, output_index: int) -> int:
        """The request's synthetic token number `output_index`; the same for the same request key and index."""
        return self.fillers(state)[self.numbers[(state.filler_offset + output_index) % SEQUENCE]]

    def fillers(self, state: RequestState) -> tuple[int, ...]:
        """The request's fillers by number; its output begins at place `state.filler_offset` of `numbers`."""
        if not state.fillers:
            state.fillers = self._fillers(state.sampling)
            state.filler_offset = text_hash(state.request_key) % _BEGINNINGS
        return state.fillers

    def legal(self, grammar_output: GrammarOutput, step: ScheduledStep | DecodeStep) -> dict[str, int]:
        """request id -> a token its grammar allows now; EOS as soon as it may end.

        Read at once: vLLM reuses the mask's memory for the next step.
        """
        requests = {request.state.request_id: request for request in step.requests}
        drafts_of = {request_id: request.draft_token_ids or [] for request_id, request in requests.items()}
        rows = _first_rows(grammar_output, drafts_of)
        return {
            request_id: self._legal_token(row.view(np.uint32), requests[request_id].state.sampling.eos_token_id)
            for request_id, row in zip(grammar_output.structured_output_request_ids, rows, strict=True)
        }

    def _legal_token(self, bits: np.ndarray, eos: int | None) -> int:
        candidates = self._grammar_order if eos is None else (eos, *self._grammar_order)
        for token in candidates:
            if token < self.vocab_size and bits[token >> 5] >> np.uint32(token & 31) & np.uint32(1):
                return token
        legal = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[: self.vocab_size])
        if not legal.size:
            raise RuntimeError("the grammar of a request allows no token at all; vLLM should have ended the request")
        return int(legal[0])

    def _fillers(self, sampling: SamplingParams) -> tuple[int, ...]:
        """What this request may see: _CLASS_TOKENS of each class, where a class has fewer some of them again."""
        stop = sampling.stop or []
        stop_strings = (stop,) if isinstance(stop, str) else tuple(stop)
        allowed = tuple(sampling.allowed_token_ids or ())
        banned = frozenset(sampling.all_stop_token_ids) | frozenset(
            token for word in (sampling.bad_words_token_ids or ()) for token in word
        )
        key = (stop_strings, allowed, banned)
        fillers = self._fillers_of.get(key)
        if fillers is None:
            if len(self._fillers_of) >= _REMEMBERED:
                self._fillers_of.clear()
            classes = self._build_classes(stop_strings, allowed, banned)
            fillers = tuple(token for members in classes for token in islice(cycle(members), _CLASS_TOKENS))
            self._fillers_of[key] = fillers
        return fillers

    def _build_classes(
        self, stop_strings: tuple[str, ...], allowed: tuple[int, ...], banned: frozenset[int]
    ) -> tuple[tuple[int, ...], ...]:
        if allowed:
            pool = [token for token in allowed if token not in banned] or list(allowed)
        else:
            pool = [token for token in self.usual if token not in banned]
            if stop_strings:
                pool = [token for token in self._texts if token not in banned]
            letters = Counter("".join(self._texts.values()))
            for stop in stop_strings:
                for letter in sorted(set(stop), key=lambda letter: letters[letter]):
                    kept = [token for token in pool if letter not in self._texts[token]]
                    if len(kept) >= _LEAST_TOKENS:
                        pool = kept
                        break
        if len(pool) < _LEAST_TOKENS:
            return (tuple(pool),) * 3
        return tuple(tuple(pool[k::3]) for k in range(3))


def _numbers() -> bytes:
    """SEQUENCE numbers of fillers, their classes in the order of a square-free word.

    The word is the differences of the Thue-Morse sequence modulo 3 (Thue 1912).
    """
    places = np.arange(SEQUENCE + 1)
    parity = np.array([place.bit_count() % 2 for place in range(256)])
    thue_morse = parity[places & 255] ^ parity[places >> 8 & 255] ^ parity[places >> 16]
    # Knuth's multiplicative hash: the class must not decide the member.
    members = (places[:-1] * 2654435761 >> 12) % _CLASS_TOKENS
    return (np.diff(thue_morse) % 3 * _CLASS_TOKENS + members).astype(np.uint8).tobytes()


def _filler_words(tokenizer: Any | None, vocab_size: int) -> tuple[tuple[int, ...], dict[int, str]]:
    """The usual fillers, and token id -> text of all that may stand in.

    Short lower-case words, then anything alphanumeric.
    """
    wanted = 3 * _CLASS_TOKENS
    if tokenizer is None:
        middle = vocab_size // 2
        ids = {middle + i: "" for i in range(min(wanted, max(vocab_size - middle, 1)))}
        return tuple(ids), ids
    special = set(tokenizer.all_special_ids)
    words: dict[int, str] = {}
    printable: dict[int, str] = {}
    for token in range(min(vocab_size, len(tokenizer), _SEARCHED_TOKENS)):
        text = "" if token in special else tokenizer.decode([token])
        if len(words) < wanted and _WORD.fullmatch(text):
            words[token] = text
        elif len(printable) < wanted and _PRINTABLE.fullmatch(text):
            printable[token] = text
    usual = words if len(words) >= 3 * _LEAST_TOKENS else words | printable
    return tuple(usual), words | printable


def _grammar_order(tokenizer: Any | None) -> tuple[int, ...]:
    """Single-character tokens, the one that ends things soonest first."""
    if tokenizer is None:
        return ()
    order = []
    for character in _CLOSERS:
        ids = tokenizer.encode(character, add_special_tokens=False)
        if len(ids) == 1 and tokenizer.decode(ids) == character:
            order.append(int(ids[0]))
    return tuple(order)


def _first_rows(grammar_output: GrammarOutput, drafts_of: dict[str, list[int]]) -> list[np.ndarray]:
    """The mask row of the next token of each structured request.

    A request owns one row per draft token and one more: as many as it has drafts up to 0.32, a fixed block from 0.33 on
    (read).
    """
    mask, request_ids = grammar_output.grammar_bitmask, grammar_output.structured_output_request_ids
    sizes = [1 + len(drafts_of.get(request_id, ())) for request_id in request_ids]
    if sum(sizes) != mask.shape[0]:
        sizes = [mask.shape[0] // len(request_ids)] * len(request_ids)
    first, rows = 0, []
    for size in sizes:
        rows.append(np.ascontiguousarray(mask[first]))
        first += size
    return rows
