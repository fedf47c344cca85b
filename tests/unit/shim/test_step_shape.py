"""SchedulerOutput -> StepShape, on stand-ins that carry exactly the fields the shim may read."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_shim.step_shape import DecodeStep, ScheduledStep, StepReader


def sampling(**changes: Any) -> Any:
    values = {"max_tokens": 100, "min_tokens": 0, "ignore_eos": False, "eos_token_id": 2, "extra_args": None}
    return SimpleNamespace(**values | changes)


def new(
    request_id: str, prompt: int | list[int], *, computed: int = 0, prefill: int | None = None, **params: Any
) -> Any:
    lora = params.pop("lora", None)
    return SimpleNamespace(
        req_id=request_id,
        prompt_token_ids=list(range(prompt)) if isinstance(prompt, int) else prompt,
        prefill_token_ids=None if prefill is None else list(range(prefill)),
        num_computed_tokens=computed,
        sampling_params=sampling(**params),
        lora_request=None if lora is None else SimpleNamespace(lora_name=lora),
    )


def output(
    scheduled: dict[str, int],
    *,
    new_requests: tuple[Any, ...] = (),
    cached: tuple[tuple[str, int, int], ...] = (),
    drafts: dict[str, list[int]] | None = None,
    finished: tuple[str, ...] = (),
) -> Any:
    """`cached` holds (request id, computed tokens, output tokens)."""
    return SimpleNamespace(
        scheduled_new_reqs=list(new_requests),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[c[0] for c in cached],
            num_computed_tokens=[c[1] for c in cached],
            num_output_tokens=[c[2] for c in cached],
        ),
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_spec_decode_tokens=drafts or {},
        finished_req_ids=set(finished),
    )


def indices(step: ScheduledStep | DecodeStep) -> dict[str, int]:
    return {request.state.request_id: request.output_index for request in step.requests}


def test_a_whole_prompt_is_one_chunk_and_yields_the_first_token() -> None:
    step = StepReader().read(output({"a": 10}, new_requests=(new("a", 10),)))
    assert [(c.num_tokens, c.context_tokens) for c in step.shape.prefill_chunks] == [(10, 0)]
    assert (step.shape.concurrency, step.shape.num_decode_requests, step.shape.decode_context_tokens) == (1, 0, 0)
    assert indices(step) == {"a": 0}


def test_a_prefix_hit_counts_as_context() -> None:
    step = StepReader().read(output({"a": 4}, new_requests=(new("a", 20, computed=16),)))
    assert [(c.num_tokens, c.context_tokens) for c in step.shape.prefill_chunks] == [(4, 16)]
    assert indices(step) == {"a": 0}


def test_chunked_prefill_yields_a_token_only_with_its_last_chunk() -> None:
    reader = StepReader()
    assert indices(reader.read(output({"a": 8}, new_requests=(new("a", 20),)))) == {"a": -1}
    middle = reader.read(output({"a": 8}, cached=(("a", 8, 0),)))
    assert indices(middle) == {"a": -1}
    assert [(c.num_tokens, c.context_tokens) for c in middle.shape.prefill_chunks] == [(8, 8)]
    assert indices(reader.read(output({"a": 4}, cached=(("a", 16, 0),)))) == {"a": 0}


def test_a_last_chunk_of_one_token_is_still_prefill() -> None:
    reader = StepReader()
    reader.read(output({"a": 19}, new_requests=(new("a", 20),)))
    step = reader.read(output({"a": 1}, cached=(("a", 19, 0),)))
    assert len(step.shape.prefill_chunks) == 1
    assert step.shape.num_decode_requests == 0
    assert indices(step) == {"a": 0}


def test_decode_reads_the_context_with_the_token_being_computed() -> None:
    reader = StepReader()
    reader.read(output({"a": 10, "b": 30}, new_requests=(new("a", 10), new("b", 30))))
    step = reader.read(output({"a": 1, "b": 1}, cached=(("a", 10, 1), ("b", 30, 1))))
    shape = step.shape
    assert (shape.num_decode_requests, shape.num_decode_tokens) == (2, 2)
    assert (shape.decode_context_tokens, shape.max_decode_context_tokens) == (11 + 31, 31)
    assert shape.previous_prefill_tokens == 40
    assert indices(step) == {"a": 1, "b": 1}


def test_a_zero_token_step_leaves_the_previous_prefill_as_it_is() -> None:
    reader = StepReader()
    reader.read(output({"a": 10}, new_requests=(new("a", 10),)))
    assert reader.read(output({})).shape.concurrency == 0
    assert reader.read(output({"a": 1}, cached=(("a", 10, 1),))).shape.previous_prefill_tokens == 10


def test_draft_tokens_are_counted_per_request() -> None:
    reader = StepReader()
    reader.read(output({"a": 10, "b": 10}, new_requests=(new("a", 10), new("b", 10))))
    step = reader.read(output({"a": 4, "b": 1}, cached=(("a", 10, 1), ("b", 10, 1)), drafts={"a": [7, 8, 9]}))
    assert list(step.shape.num_draft_tokens) == [3]
    assert (step.shape.num_decode_requests, step.shape.num_decode_tokens) == (2, 5)
    assert step.shape.max_decode_context_tokens == 14
    assert indices(step) == {"a": 1, "b": 1}


def test_a_request_resumed_by_the_v1_runner_is_prefill_until_it_has_caught_up() -> None:
    reader = StepReader()
    reader.read(output({"a": 10}, new_requests=(new("a", 10),)))
    step = reader.read(output({"a": 13}, cached=(("a", 0, 5),)))
    assert [(c.num_tokens, c.context_tokens) for c in step.shape.prefill_chunks] == [(13, 0)]
    assert indices(step) == {"a": -1}
    assert indices(reader.read(output({"a": 2}, cached=(("a", 13, 5),)))) == {"a": 5}


def test_a_request_resumed_by_the_v2_runner_is_not_new_again() -> None:
    reader = StepReader()
    first = reader.read(output({"a": 10}, new_requests=(new("a", 10),)))
    again = reader.read(output({"a": 15}, new_requests=(new("a", 10, prefill=15),)))
    assert len(first.shape.new_requests) == 1
    assert len(again.shape.new_requests) == 0
    assert indices(again) == {"a": 5}
    assert again.requests[0].state is first.requests[0].state


def test_a_finished_request_is_forgotten() -> None:
    reader = StepReader()
    reader.read(output({"a": 10}, new_requests=(new("a", 10),)))
    again = reader.read(output({"a": 10}, new_requests=(new("a", 10),), finished=("a",)))
    assert len(again.shape.new_requests) == 1


def test_requests_keep_the_scheduler_s_order() -> None:
    reader = StepReader()
    reader.read(output({"a": 10}, new_requests=(new("a", 10),)))
    step = reader.read(output({"a": 1, "b": 5}, new_requests=(new("b", 5),), cached=(("a", 10, 1),)))
    assert list(indices(step)) == ["a", "b"]


def test_new_requests_carry_what_decides_their_end() -> None:
    request = new(
        "cmpl-mine-0-12345678",
        10,
        max_tokens=50,
        min_tokens=3,
        extra_args={"step_oracle_output_tokens": 7, "step_oracle_class": "chat"},
        lora="adapter",
    )
    step = StepReader().read(output({"cmpl-mine-0-12345678": 10}, new_requests=(request,)))
    seen = step.shape.new_requests[0]
    assert (seen.request_key, seen.prompt_tokens, seen.max_tokens, seen.min_tokens) == ("cmpl-mine-0", 10, 50, 3)
    assert (seen.output_tokens_hint, seen.length_class, seen.lora, seen.ignore_eos) == (7, "chat", "adapter", False)
    assert step.shape.num_loras == 1


@pytest.mark.parametrize("hint", ["many", -1, 0, None, 1 << 40, [3]])
def test_a_hint_that_is_no_token_count_is_none(hint: Any) -> None:
    request = new("a", 10, extra_args={"step_oracle_output_tokens": hint})
    assert StepReader().read(output({"a": 10}, new_requests=(request,))).shape.new_requests[0].output_tokens_hint == 0


def test_without_an_eos_id_a_request_cannot_end_by_eos() -> None:
    request = new("a", 10, eos_token_id=None)
    assert StepReader().read(output({"a": 10}, new_requests=(request,))).shape.new_requests[0].ignore_eos


def key_of(reader: StepReader, request_id: str, prompt: list[int]) -> str:
    step = reader.read(output({request_id: len(prompt)}, new_requests=(new(request_id, prompt),)))
    return str(step.shape.new_requests[0].request_key)


def test_the_key_is_the_client_s_id_without_the_random_suffix() -> None:
    assert key_of(StepReader(), "cmpl-bench-1a2b-17-0-89abcdef", [1, 2]) == "cmpl-bench-1a2b-17-0"


@pytest.mark.parametrize("key", ["chatcmpl-mine-deadbeef", "cmpl-mine-0/1", "prompt:0123456789abcdef#0", "3_mine"])
def test_where_ids_are_keys_nothing_is_taken_off(key: str) -> None:
    """A replay's requests carry the keys of a trace; vLLM's front end, which adds a suffix, is not there."""
    assert key_of(StepReader(ids_are_keys=True), key, [1, 2]) == key


def test_an_id_nobody_chose_is_replaced_by_the_prompt() -> None:
    one, two = StepReader(), StepReader()
    first = key_of(one, "cmpl-0123456789abcdef-0-11111111", [1, 2, 3])
    assert first == key_of(two, "chatcmpl-fedcba9876543210-22222222", [1, 2, 3])
    assert first.startswith("prompt:")
    assert first != key_of(two, "cmpl-0123456789abcdef-0-33333333", [1, 2, 4])


def test_a_repeated_prompt_is_told_apart_by_its_occurrence() -> None:
    reader = StepReader()
    keys = [key_of(reader, f"cmpl-{i:016x}-0-{i:08x}", [1, 2, 3]) for i in range(3)]
    assert [key.rpartition("#")[2] for key in keys] == ["0", "1", "2"]
    assert len({key.partition("#")[0] for key in keys}) == 1


def test_the_children_of_one_request_have_keys_of_their_own() -> None:
    reader = StepReader()
    keys = [key_of(reader, f"{child}_cmpl-mine-0-12345678", [1]) for child in range(2)]
    assert keys == ["cmpl-mine-0/0", "cmpl-mine-0/1"]
