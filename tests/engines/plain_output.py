"""Runs inside a vLLM environment: the short way to an output beside the long one, over random requests.

Prints how many steps took the short way, or ends with the first difference.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from step_oracle.v1 import step_pb2 as pb
from vllm_shim.output import OutputBuilder
from vllm_shim.step_shape import DecodeStep, RequestState, ScheduledRequest, ScheduledStep
from vllm_shim.tokens import TokenSource

VOCAB = 1000


def state(draw: random.Random, number: int) -> RequestState:
    sampling = SimpleNamespace(
        stop=draw.choice((None, "x", ["y", "z"])),
        allowed_token_ids=draw.choice((None, None, [10, 11, 12, 13])),
        all_stop_token_ids={2},
        bad_words_token_ids=None,
        eos_token_id=draw.choice((2, 2, None)),
        min_tokens=draw.choice((0, 0, 7)),
        logprobs=draw.choice((None,) * 30 + (0, 3)),
        logprob_token_ids=None,
        prompt_logprobs=None,
    )
    made = RequestState(f"r{number % 50}", f"key-{number}", 5, sampling, [1] * 5)
    made.target_output_tokens = draw.choice((0, 4, 9, 200))
    return made


def same(a: Any, b: Any) -> bool:
    return (
        a.req_ids == b.req_ids
        and a.req_id_to_index == b.req_id_to_index
        and [list(ids) for ids in a.sampled_token_ids] == [list(ids) for ids in b.sampled_token_ids]
        and (a.logprobs is None) == (b.logprobs is None)
    )


def main(seed: int) -> int:
    draw = random.Random(seed)
    tokens = TokenSource(None, VOCAB)
    short, long = OutputBuilder(tokens, speculative=False), OutputBuilder(tokens, speculative=False)
    ways = [0, 0]
    number = 0
    states: list[RequestState] = []
    indices: list[int] = []
    for _ in range(6000):
        follows = bool(states) and draw.random() < 0.95
        if not follows:
            # Another set of requests: some leave, some come, some are in another order.
            pairs = [pair for pair in zip(states, indices, strict=True) if draw.random() < 0.7]
            draw.shuffle(pairs)
            taken = {made.request_id for made, _ in pairs}
            for _ in range(draw.randrange(1, 4)):
                number += 1
                made = state(draw, number)
                if made.request_id not in taken:
                    taken.add(made.request_id)
                    pairs.append((made, draw.randrange(1, 12)))
            states, indices = [made for made, _ in pairs], [index for _, index in pairs]
            ids = [made.request_id for made in states]
        step = DecodeStep(ids, states, list(indices), len(states), 100, 100, 0, follows=follows)
        reply = pb.StepReply(generated_tokens=len(states))
        # A grammar's choice takes the long way, between steps that take the short one.
        legal = {ids[0]: 7} if draw.random() < 0.02 else {}
        twins = [ScheduledRequest(replace(made), index, None) for made, index in zip(states, indices, strict=True)]
        expected = long.build(ScheduledStep(pb.StepShape(), twins), reply, legal)
        got = short.build(step, reply, legal)
        ways[short._columns is None or bool(legal)] += 1
        if not same(got, expected):
            print(f"{step}\n{got}\n{expected}", file=sys.stderr)
            return 1
        indices = [index + 1 for index in indices]
    print(*ways)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
