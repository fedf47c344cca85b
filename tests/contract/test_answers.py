"""Answers are pure: the same request gives the same bytes from every server, stream and restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from oracle_calls import Calls, decode, identity, mixed_steps, prefill
from oracle_process import OracleProcess
from step_oracle.v1 import experiment_pb2, oracle_service_pb2, step_pb2

Dirs = dict[str, Path]

TABLE = experiment_pb2.LengthTable(
    classes=[
        experiment_pb2.LengthClass(
            prompt_bin_begin=[0, 100], quantile_tokens=[10, 20, 30, 100, 200, 300], quantiles_per_bin=3
        )
    ]
)


def new_requests(count: int) -> list[step_pb2.NewRequest]:
    return [step_pb2.NewRequest(request_key=f"r{i}", prompt_tokens=10 * i + 1) for i in range(count)]


def everything() -> list[step_pb2.StepRequest]:
    """Steps with every random part of an answer."""
    steps = mixed_steps(200)
    steps.append(prefill(200, (10, 0), (5, 3), new_requests=new_requests(20)))
    steps.append(decode(201, num_decode_tokens=10, num_draft_tokens=[3, 1, 2]))
    return steps


@pytest.mark.parametrize("pack", ["composed", "sampled", "hybrid"])
def test_two_servers_and_a_restarted_one_answer_the_same_bytes(
    pack: str, new_server: Callable[..., OracleProcess], pack_dirs: Dirs
) -> None:
    answers = []
    for name in ("one", "two"):
        server = new_server(name)
        with Calls(server.target) as calls:
            calls.create(calls.upload(pack_dirs[pack]), seed=2**64 - 1, draft_acceptance_rate=0.6, length_table=TABLE)
            answers.append([r.SerializeToString(deterministic=True) for r in calls.sample(identity("e"), everything())])
        if name == "two":
            server.kill()
            server.start()
            with Calls(server.target) as calls:
                stream = calls.join("e")
                replies = [reply for step in everything() for reply in stream.ask(step)]
                answers.append([r.SerializeToString(deterministic=True) for r in replies])
                stream.close()
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0])) > 50


def test_a_resent_step_gets_the_same_answer(shared: Calls) -> None:
    stream = shared.join("resend")
    first = stream.ask(decode(3))
    stream.ask(decode(4))
    assert stream.ask(decode(3)) == first
    stream.close()


def test_replies_come_in_the_order_of_the_steps(shared: Calls) -> None:
    stream = shared.join("order")
    steps = mixed_steps(100)
    assert [reply.step_index for reply in stream.ask(*steps)] == [step.step_index for step in steps]
    stream.close()


def test_engines_and_steps_draw_independently(shared: Calls) -> None:
    first = [r.latency_ns[0] for r in shared.sample(identity("a"), [decode(i) for i in range(50)])]
    second = [r.latency_ns[0] for r in shared.sample(identity("b"), [decode(i) for i in range(50)])]
    assert first != second
    assert len(set(first)) == 4  # the ratios of the pack's pool


def test_the_seed_changes_the_draws_and_the_pack_does_not(calls: Calls, pack_dirs: Dirs) -> None:
    """Two packs under one seed are compared with common random numbers."""
    digest = calls.upload(pack_dirs["constant"])
    steps = [prefill(0, (10, 0), new_requests=new_requests(30))]
    calls.create(digest, seed=1, length_table=TABLE)
    one = calls.sample(identity("e"), steps)[0].target_output_tokens
    calls.activate(calls.upload(pack_dirs["composed"]), seed=1, length_table=TABLE)
    other_pack = calls.sample(identity("e"), steps)[0].target_output_tokens
    calls.activate(digest, seed=2, length_table=TABLE)
    other_seed = calls.sample(identity("e"), steps)[0].target_output_tokens
    assert list(one) == list(other_pack)
    assert list(one) != list(other_seed)


def test_a_target_length_follows_ignore_eos_then_the_hint_then_the_table(calls: Calls, pack_dirs: Dirs) -> None:
    requests = [
        step_pb2.NewRequest(request_key="a", prompt_tokens=5, ignore_eos=True, output_tokens_hint=7),
        step_pb2.NewRequest(request_key="b", prompt_tokens=5, output_tokens_hint=7),
        step_pb2.NewRequest(request_key="c", prompt_tokens=5),
        step_pb2.NewRequest(request_key="d", prompt_tokens=500),
    ]
    digest = calls.upload(pack_dirs["constant"])
    calls.create(digest, length_table=TABLE)
    targets = calls.sample(identity("e"), [prefill(0, (5, 0), new_requests=requests)])[0].target_output_tokens
    assert (targets[0].output_tokens, targets[0].source) == (0, step_pb2.LENGTH_SOURCE_IGNORE_EOS)
    assert (targets[1].output_tokens, targets[1].source) == (7, step_pb2.LENGTH_SOURCE_HINT)
    assert targets[2].source == targets[3].source == step_pb2.LENGTH_SOURCE_TABLE
    assert 10 <= targets[2].output_tokens <= 30
    assert 100 <= targets[3].output_tokens <= 300
    calls.activate(digest)
    targets = calls.sample(identity("e"), [prefill(0, (5, 0), new_requests=requests)])[0].target_output_tokens
    assert (targets[2].output_tokens, targets[2].source) == (0, step_pb2.LENGTH_SOURCE_NONE)


def test_time_scale_and_a_slow_down_multiply_the_latency(calls: Calls, pack_dirs: Dirs) -> None:
    overlay = experiment_pb2.Overlay(labels={"rack": "7"}, slow_down_factor=1.5)
    calls.create(calls.upload(pack_dirs["constant"]), time_scale=0.25, overlays=[overlay])
    assert list(calls.sample(identity("a"), [decode(0)])[0].latency_ns) == [2_500_000]
    slow = identity("b", labels={"rack": "7"})
    assert list(calls.sample(slow, [decode(0)])[0].latency_ns) == [3_750_000]


def test_drafts_are_accepted_up_to_the_first_refusal(calls: Calls, pack_dirs: Dirs) -> None:
    calls.create(calls.upload(pack_dirs["constant"]), draft_acceptance_rate=1.0)
    step = decode(0, num_decode_tokens=10, num_draft_tokens=[4, 2])
    reply = calls.sample(identity("e"), [step])[0]
    assert (list(reply.accepted_draft_tokens), reply.generated_tokens) == ([4, 2], 10)


def test_rules_send_engines_to_their_packs(calls: Calls, pack_dirs: Dirs) -> None:
    ten, twenty = calls.upload(pack_dirs["constant"]), calls.upload(pack_dirs["constant20"])
    rules = [
        experiment_pb2.Rule(labels={"gpu": "l40s"}, tensor_parallel_size=2, pack_digest=twenty),
        experiment_pb2.Rule(fraction=0.5, fraction_salt="ab", model="big", pack_digest=twenty),
    ]
    calls.create(ten, rules=rules)

    def latency(engine: oracle_service_pb2.EngineIdentity) -> int:
        return calls.sample(engine, [decode(0)])[0].latency_ns[0]

    assert latency(identity("a", labels={"gpu": "l40s"}, tensor_parallel_size=2)) == 20_000_000
    assert latency(identity("a", labels={"gpu": "l40s"}, tensor_parallel_size=1)) == 10_000_000
    shares = {latency(identity(f"e{i}", model="/models/big", tensor_parallel_size=1)) for i in range(40)}
    assert shares == {10_000_000, 20_000_000}
    for i in range(10):
        ranks = {latency(identity(f"e{i}/dp{r}", model="big", tensor_parallel_size=1)) for r in range(4)}
        assert len(ranks) == 1


def test_the_device_is_that_of_the_first_rule_that_may_fit(calls: Calls, pack_dirs: Dirs) -> None:
    rule = experiment_pb2.Rule(model="big", pack_digest=calls.upload(pack_dirs["constant"]))
    calls.create("", rules=[rule])
    request = oracle_service_pb2.GetDeviceRequest(engine=identity("a"))
    response = calls.oracle.GetDevice(request)
    assert (response.device.name, response.generation, response.block_size) == ("Test Device", 1, 16)
