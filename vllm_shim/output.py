"""ScheduledStep and reply -> the ModelRunnerOutput vLLM's scheduler reads, with logprobs where asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

from vllm_shim.step_shape import DecodeStep
from vllm_shim.tokens import SEQUENCE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.sampling_params import SamplingParams

    from vllm_shim.lease import Reply
    from vllm_shim.step_shape import RequestState, ScheduledStep
    from vllm_shim.tokens import TokenSource

_SAMPLED_LOGPROB = -0.5
# Steps whose tokens are worked out at once, where the same requests decode for long.
_MOST_AHEAD = 16


class OutputBuilder:
    """ScheduledStep + StepReply -> ModelRunnerOutput. Engine thread only; steps resolve in order."""

    def __init__(self, tokens: TokenSource, *, speculative: bool) -> None:
        self._tokens = tokens
        self._numbers = np.frombuffer(tokens.numbers, np.uint8)
        self._speculative = speculative
        # What is worked out once for the requests that decode.
        self._columns: Any = None
        self._columns_of: list[RequestState] | None = None
        # Tokens of the steps to come, the next one's last, and the output index of its first request.
        self._ahead: list[list[list[int]]] = []
        self._ahead_index = -1
        self._num_ahead = 1

    def build(self, step: ScheduledStep | DecodeStep, reply: Reply, legal: dict[str, int]) -> ModelRunnerOutput:
        """The output vLLM's scheduler reads; `legal` holds the grammar's choice per request id."""
        if isinstance(step, DecodeStep) and not (legal or self._speculative) and (output := self._build_plain(step)):
            return output
        for state, target in zip(step.new_requests, reply.target_output_tokens, strict=True):
            state.target_output_tokens = target.output_tokens
        accepted = iter(reply.accepted_draft_tokens)
        outputs: list[tuple[RequestState, list[int]]] = []
        several, width = False, -1
        for request in step.requests:
            state = request.state
            width = max(width, self._num_logprobs(state))
            if request.output_index < 0:
                outputs.append((state, []))
                continue
            drafts = request.draft_token_ids
            num_accepted = next(accepted) if drafts else 0
            index = state.emitted_tokens if self._speculative else request.output_index
            choice = legal.get(state.request_id)
            if choice is not None:
                # A grammar confirms one token at a time: drafts of synthetic words are never legal.
                generated = [choice]
            elif num_accepted:
                generated = self._accepted(state, index, drafts or [], num_accepted)
            else:
                generated = [self._token(state, index)]
            state.emitted_tokens = index + len(generated)
            several = several or len(generated) > 1
            outputs.append((state, generated))
        request_ids = [state.request_id for state, _ in outputs]
        starts = _starts(outputs) if several else None
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(request_ids)},
            sampled_token_ids=[generated for _, generated in outputs],
            logprobs=self._sampled_logprobs(outputs, starts, width) if width >= 0 else None,
            prompt_logprobs_dict=self._prompt_logprobs(step),
        )

    def _build_plain(self, step: DecodeStep) -> ModelRunnerOutput | None:
        """The same for decode requests that want tokens and nothing else; None where one wants more."""
        states, first = step.states, step.output_indices[0]
        if states is not self._columns_of:
            self._columns_of, self._columns = states, self._columns_for(states)
        if self._columns is None:
            return None
        if not (step.follows and self._ahead and first == self._ahead_index):
            self._num_ahead = min(2 * self._num_ahead, _MOST_AHEAD) if step.follows else 1
            self._ahead = self._tokens_ahead(step.output_indices)
        self._ahead_index = first + 1
        return ModelRunnerOutput(step.request_ids, self._columns[0], self._ahead.pop())

    def _columns_for(self, states: list[RequestState]) -> Any:
        """(Index by request id; of each request: where its fillers begin, offset, number of its last token, EOS; all
        fillers). None where a request wants more than tokens.
        """
        if any(self._num_logprobs(state) >= 0 for state in states):
            return None
        tables = {id(state.fillers): state.fillers for state in states}
        ends = np.cumsum([len(table) for table in tables.values()])
        begins = dict(zip(tables, (0, *ends.tolist()), strict=False))
        return (
            {state.request_id: i for i, state in enumerate(states)},
            np.array([begins[id(state.fillers)] for state in states]),
            np.array([state.filler_offset for state in states]),
            np.array([state.last_index for state in states]),
            [state.sampling.eos_token_id for state in states],
            # The objects as they are: a list of them is made without making each anew.
            np.array([token for table in tables.values() for token in table], object),
        )

    def _tokens_ahead(self, indices: list[int]) -> list[list[list[int]]]:
        """[steps, requests, 1]: the tokens from these numbers on, the first step last."""
        _, begins, offsets, last, eos, fillers = self._columns
        now = np.array(indices)
        places = offsets + now + np.arange(self._num_ahead)[::-1, None]
        tokens = fillers[begins + self._numbers[places % SEQUENCE]]
        left = last - now
        for i in np.flatnonzero((left >= 0) & (left < self._num_ahead)).tolist():
            tokens[-1 - left[i], i] = eos[i]
        ahead: list[list[list[int]]] = tokens[..., None].tolist()
        return ahead

    def _num_logprobs(self, state: RequestState) -> int:
        """What the request wants of logprobs, as `_asked`; what else holds for all its tokens is worked out with it."""
        if state.num_logprobs is None:
            state.num_logprobs = _asked(state.sampling, self._tokens.vocab_size)
            state.last_index = _last_index(state)
            self._tokens.fillers(state)
        return state.num_logprobs

    def _token(self, state: RequestState, index: int) -> int:
        """EOS at the request's target length, never before min_tokens; else a filler."""
        if index == state.last_index:
            return int(state.sampling.eos_token_id)
        return self._tokens.filler(state, index)

    def _accepted(self, state: RequestState, index: int, drafts: list[int], num_accepted: int) -> list[int]:
        """Accepted drafts and the token after them, cut at EOS."""
        generated: list[int] = []
        for position in range(num_accepted + 1):
            token = self._token(state, index + position)
            is_eos = token == state.sampling.eos_token_id
            if not is_eos and position < num_accepted and drafts[position] >= 0:
                token = drafts[position]
            generated.append(token)
            if is_eos:
                break
        return generated

    def _prompt_logprobs(self, step: ScheduledStep | DecodeStep) -> dict[str, LogprobsTensors | None]:
        found: dict[str, LogprobsTensors | None] = {}
        for request in step.requests:
            width = request.state.sampling.prompt_logprobs
            if width is not None and request.output_index == 0:
                found[request.state.request_id] = self._prompt_rows(request.state, width)
        return found

    def _sampled_logprobs(
        self, requests: Sequence[tuple[RequestState, list[int]]], starts: list[int] | None, width: int
    ) -> LogprobsLists:
        """One row per position for all requests of the step.

        Shapes [positions, width + 1], [positions, width + 1], [positions] with width the largest number asked for; the
        sampled token comes first with probability e^-0.5 and the others share what is left, halving.
        """
        rows = [(state, token) for state, tokens in requests for token in (tokens or [0])]
        token_ids = np.empty((len(rows), width + 1), np.int32)
        logprobs = np.empty((len(rows), width + 1), np.float32)
        for row, (state, token) in enumerate(rows):
            token_ids[row], logprobs[row] = self._logprob_row(token, width, state.sampling)
        return LogprobsLists(token_ids, logprobs, np.ones(len(rows), np.int32), starts)

    def _prompt_rows(self, state: RequestState, width: int) -> LogprobsTensors | None:
        """Rows for prompt tokens 1 ... n-1, shapes [n - 1, width + 1], [n - 1, width + 1], [n - 1]."""
        prompt = state.prompt_token_ids
        if prompt is None or len(prompt) < 2:
            return None
        width = self._tokens.vocab_size - 1 if width < 0 else width
        rows = [self._logprob_row(token, width, state.sampling) for token in prompt[1:]]
        return LogprobsTensors(
            torch.from_numpy(np.stack([ids for ids, _ in rows]).astype(np.int32)),
            torch.from_numpy(np.stack([values for _, values in rows]).astype(np.float32)),
            torch.ones(len(rows), dtype=torch.int32),
        )

    def _logprob_row(self, token: int, width: int, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        wanted = getattr(sampling, "logprob_token_ids", None)
        others = [other for other in (wanted or self._tokens.usual) if other != token][:width]
        if len(others) < width:
            present = {token, *others}
            others += [other for other in range(self._tokens.vocab_size) if other not in present][: width - len(others)]
        ids = np.array([token, *others], np.int32)
        rest = np.log(1 - np.exp(_SAMPLED_LOGPROB))
        logprobs = np.concatenate(([_SAMPLED_LOGPROB], rest - np.log(2.0) * np.minimum(np.arange(1, width + 1), 64)))
        return ids, logprobs.astype(np.float32)


def _last_index(state: RequestState) -> int:
    """RequestState.last_index: the request's target length, never before min_tokens."""
    target, sampling = state.target_output_tokens, state.sampling
    return max(target, sampling.min_tokens) - 1 if target and sampling.eos_token_id is not None else -1


def _asked(sampling: SamplingParams, vocab_size: int) -> int:
    """Logprobs a request wants beside the sampled token's; -1: none at all."""
    wanted = getattr(sampling, "logprob_token_ids", None)
    if wanted:
        return len(wanted)
    if sampling.logprobs is None:
        return -1
    return vocab_size - 1 if sampling.logprobs < 0 else int(sampling.logprobs)


def _starts(outputs: list[tuple[RequestState, list[int]]]) -> list[int]:
    """First logprob row of each request; a request without a token still owns one."""
    starts, position = [], 0
    for _, generated in outputs:
        starts.append(position)
        position += max(len(generated), 1)
    return starts
