"""SchedulerOutput -> StepShape: the one function that capture, replay and emulation share.

It reads only fields that did not change from vLLM 0.18.1 to 0.33.0 (see the README).
"""

from __future__ import annotations

import re
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import sub
from typing import TYPE_CHECKING, Any

from step_oracle.v1 import step_pb2 as pb

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

# vLLM appends 8 random hex digits to the client's id (InputProcessor.assign_request_id, 0.18.1 to 0.33.0).
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
# An id nobody chose: vLLM's own random_uuid (16 or 32 hex digits) or a UUID, with the API's prefix and index around it.
_NOBODYS_ID = re.compile(
    r"(?:[a-z]+-)*(?:[0-9a-f]{16}|[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:-\d+)*"
)
_CHILD = re.compile(r"^(\d+)_")
_HASHED_TOKENS = 2048
_REMEMBERED_PROMPTS = 65_536


@dataclass(slots=True)
class RequestState:
    """What the shim knows of a request between its first schedule and its end. Engine thread only."""

    request_id: str
    request_key: str
    prompt_tokens: int
    sampling: SamplingParams
    prompt_token_ids: list[int] | None
    lora: str = ""
    # Token number at which EOS is emitted; 0: never. Set when the first reply arrives.
    target_output_tokens: int = 0
    # What TokenSource and OutputBuilder work out once per request.
    fillers: Any = None
    filler_offset: int = 0
    num_logprobs: int | None = None
    # Number of the output token that is EOS; -1: none.
    last_index: int = -1
    # Tokens handed to the scheduler; only speculation reads it, since its placeholders blur the scheduler's own count.
    emitted_tokens: int = 0


@dataclass(slots=True)
class ScheduledRequest:
    """One request of one step, in the scheduler's order."""

    state: RequestState
    # Zero-based number of the output token this step yields; -1 where it yields none (an unfinished prompt). Under
    # speculation the scheduler's count is blurred by placeholders: RequestState.emitted_tokens is read instead.
    output_index: int
    draft_token_ids: list[int] | None = None


@dataclass(slots=True)
class ScheduledStep:
    """A step as the executor needs it: what to ask, and who gets a token."""

    shape: pb.StepShape
    requests: list[ScheduledRequest] = field(default_factory=list)
    new_requests: list[RequestState] = field(default_factory=list)


@dataclass(slots=True)
class DecodeStep:
    """A step of decode requests alone, one token each; made without a look at every request."""

    request_ids: list[str]
    # The same list as long as the same requests decode.
    states: list[RequestState]
    # As ScheduledRequest.output_index.
    output_indices: list[int]
    num_requests: int
    context_tokens: int
    max_context_tokens: int
    previous_prefill_tokens: int
    # The step before it was of the same requests, one token earlier each.
    follows: bool = False
    new_requests: tuple[RequestState, ...] = ()

    @property
    def shape(self) -> pb.StepShape:
        return pb.StepShape(
            num_decode_requests=self.num_requests,
            num_decode_tokens=self.num_requests,
            decode_context_tokens=self.context_tokens,
            max_decode_context_tokens=self.max_context_tokens,
            concurrency=self.num_requests,
            previous_prefill_tokens=self.previous_prefill_tokens,
            num_loras=len({state.lora for state in self.states} - {""}),
        )

    @property
    def requests(self) -> list[ScheduledRequest]:
        return [ScheduledRequest(*pair) for pair in zip(self.states, self.output_indices, strict=True)]


class StepReader:
    """Follows one scheduler; `read` must see every SchedulerOutput, in order. Owned by the engine thread."""

    def __init__(self, *, ids_are_keys: bool = False) -> None:
        """`ids_are_keys`: request ids have not been through vLLM's front end, which adds a random suffix to each."""
        self._ids_are_keys = ids_are_keys
        self._requests: dict[str, RequestState] = {}
        self._previous_prefill_tokens = 0
        self._prompt_occurrences: OrderedDict[str, int] = OrderedDict()
        self._loras_seen = False
        # Who decoded last; computed less output tokens of each, where only its next token is left to compute.
        self._decoding: tuple[list[str], list[RequestState], list[int]] = ([], [], [])
        # The step before this one, where it was of decode requests alone and all of them go on.
        self._last: DecodeStep | None = None

    def read(self, scheduler_output: SchedulerOutput) -> ScheduledStep | DecodeStep:
        """The shape of the step and the requests in it; total_num_scheduled_tokens 0 gives an empty step."""
        if scheduler_output.finished_req_ids:
            self._decoding, self._last = ([], [], []), None
            for request_id in scheduler_output.finished_req_ids:
                self._requests.pop(request_id, None)
        self._last = decode = self._read_decode(scheduler_output)
        if decode is not None:
            self._previous_prefill_tokens = 0
            return decode
        shape = pb.StepShape(
            concurrency=len(scheduler_output.num_scheduled_tokens),
            previous_prefill_tokens=self._previous_prefill_tokens,
        )
        step = ScheduledStep(shape)
        if not scheduler_output.total_num_scheduled_tokens:
            return step
        scheduled = scheduler_output.num_scheduled_tokens
        by_id: dict[str, ScheduledRequest] = {}
        for new in scheduler_output.scheduled_new_reqs:
            by_id[new.req_id] = self._read_new(new, scheduled[new.req_id], step)
        self._read_cached(scheduler_output.scheduled_cached_reqs, scheduler_output, step, by_id)
        # The order of num_scheduled_tokens is the order in which vLLM reads the output back.
        step.requests = [by_id[request_id] for request_id in scheduled]
        if self._loras_seen:
            shape.num_loras = len({request.state.lora for request in step.requests} - {""})
        self._previous_prefill_tokens = sum(chunk.num_tokens for chunk in shape.prefill_chunks)
        return step

    def _read_decode(self, scheduler_output: SchedulerOutput) -> DecodeStep | None:
        """A step in which every request is past its prompt and computes its one next token; None for any other."""
        cached = scheduler_output.scheduled_cached_reqs
        ids, computed, outputs = cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens
        # One token each, in one order, and nobody new: what speculates or has no token has another number of tokens.
        if (
            scheduler_output.total_num_scheduled_tokens != len(ids)
            or list(scheduler_output.num_scheduled_tokens) != ids
        ):
            return None
        last = self._last
        # None can be further than the one token of the step before, so where all together are, each is.
        if last is not None and ids == last.request_ids and sum(computed) == last.context_tokens:
            context, longest = last.context_tokens + len(ids), last.max_context_tokens + 1
            return DecodeStep(ids, last.states, outputs, len(ids), context, longest, 0, follows=True)
        if ids != self._decoding[0]:
            states = [self._requests[request_id] for request_id in ids]
            self._decoding = (ids, states, [state.prompt_tokens - 1 for state in states])
        if not ids or 0 in outputs or list(map(sub, computed, outputs)) != self._decoding[2]:
            return None
        context, longest = sum(computed) + len(ids), max(computed) + 1
        states = self._decoding[1]
        return DecodeStep(ids, states, outputs, len(ids), context, longest, self._previous_prefill_tokens)

    def _read_new(self, new: NewRequestData, num_tokens: int, step: ScheduledStep) -> ScheduledRequest:
        """A request of scheduled_new_reqs.

        A first schedule, or (model runner V2) one that comes back after a preemption.
        """
        prompt = new.prompt_token_ids
        prompt_tokens = len(prompt) if prompt is not None else int(new.prompt_embeds.shape[0])
        prefill = getattr(new, "prefill_token_ids", None)
        known_tokens = len(prefill) if prefill is not None else prompt_tokens
        state = self._requests.get(new.req_id)
        if state is None:
            lora = new.lora_request.lora_name if new.lora_request is not None else ""
            key = new.req_id if self._ids_are_keys else self._request_key(new.req_id, prompt)
            state = RequestState(new.req_id, key, prompt_tokens, new.sampling_params, prompt, lora)
            self._requests[new.req_id] = state
            self._loras_seen = self._loras_seen or bool(lora)
            step.new_requests.append(state)
            step.shape.new_requests.append(_new_request(state))
        step.shape.prefill_chunks.add(num_tokens=num_tokens, context_tokens=new.num_computed_tokens)
        ends = new.num_computed_tokens + num_tokens >= known_tokens
        return ScheduledRequest(state, known_tokens - prompt_tokens if ends else -1)

    def _read_cached(
        self,
        cached: CachedRequestData,
        scheduler_output: SchedulerOutput,
        step: ScheduledStep,
        by_id: dict[str, ScheduledRequest],
    ) -> None:
        shape, scheduled = step.shape, scheduler_output.num_scheduled_tokens
        drafts_of = scheduler_output.scheduled_spec_decode_tokens
        decode_requests = decode_tokens = context_sum = context_max = 0
        for request_id, computed, outputs in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            state = self._requests[request_id]
            num_tokens = scheduled[request_id]
            drafts = drafts_of.get(request_id) if drafts_of else None
            num_drafts = len(drafts) if drafts else 0
            known_tokens = state.prompt_tokens + outputs
            # vLLM's own rule of who yields a token; `outputs` counts the placeholders of steps in flight.
            ends = computed + num_tokens - num_drafts >= known_tokens
            if ends and outputs > 0 and num_tokens - num_drafts == 1:
                context = computed + num_tokens
                decode_requests += 1
                decode_tokens += num_tokens
                context_sum += context
                if context > context_max:
                    context_max = context
                if num_drafts:
                    shape.num_draft_tokens.append(num_drafts)
            else:
                shape.prefill_chunks.add(num_tokens=num_tokens, context_tokens=computed)
                drafts = None
            by_id[request_id] = ScheduledRequest(state, outputs if ends else -1, drafts)
        shape.num_decode_requests = decode_requests
        shape.num_decode_tokens = decode_tokens
        shape.decode_context_tokens = context_sum
        shape.max_decode_context_tokens = context_max

    def _request_key(self, request_id: str, prompt: list[int] | None) -> str:
        """The client's id without vLLM's random suffix, or a hash of the prompt where the client gave none."""
        base = _RANDOM_SUFFIX.sub("", request_id)
        child = _CHILD.match(base)
        if child:
            base = base[child.end() :]
        if _NOBODYS_ID.fullmatch(base):
            base = self._prompt_key(prompt or [], count=not child or child[1] == "0")
        return f"{base}/{child[1]}" if child else base

    def _prompt_key(self, prompt: list[int], *, count: bool) -> str:
        """Hash of the prompt's ends and length; a repeated prompt is told apart by its occurrence in this engine."""
        ends = array("q", prompt[:_HASHED_TOKENS] + prompt[-_HASHED_TOKENS:] + [len(prompt)])
        digest = blake2b(ends.tobytes(), digest_size=8).hexdigest()
        occurrence = self._prompt_occurrences.get(digest, -1) + (1 if count else 0)
        self._prompt_occurrences[digest] = max(occurrence, 0)
        self._prompt_occurrences.move_to_end(digest)
        if len(self._prompt_occurrences) > _REMEMBERED_PROMPTS:
            self._prompt_occurrences.popitem(last=False)
        return f"prompt:{digest}#{max(occurrence, 0)}"


def _new_request(state: RequestState) -> pb.NewRequest:
    sampling = state.sampling
    extra = sampling.extra_args or {}
    return pb.NewRequest(
        request_key=state.request_key,
        prompt_tokens=state.prompt_tokens,
        max_tokens=sampling.max_tokens or 0,
        min_tokens=sampling.min_tokens,
        # Without an EOS id the scheduler cannot end a request by EOS: the same as ignoring it.
        ignore_eos=bool(sampling.ignore_eos) or sampling.eos_token_id is None,
        output_tokens_hint=_hint(extra.get("step_oracle_output_tokens")),
        lora=state.lora,
        length_class=str(extra.get("step_oracle_class", "")),
    )


def _hint(value: Any) -> int:
    """The hint as a positive number of tokens; anything else counts as no hint."""
    try:
        hint = int(value)
    except (TypeError, ValueError):
        return 0
    return hint if 0 < hint < 1 << 31 else 0
