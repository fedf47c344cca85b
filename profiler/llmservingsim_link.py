"""Communication between ranks, which no table of a bundle holds: rings over one link, all of it modelled.

What is sent when is read from vLLM 0.33.0 with the backend `allgather_reducescatter`: with data parallelism the ranks
of a MoE layer gather each other's tokens, each runs its own experts on all of them, and a reduce-scatter returns the
sums. With tensor parallelism too, each rank brings its share of the tokens and the layer ends in a gather among the
tensor-parallel ranks, in the place of an all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oracle_server.errors import InvalidArgument
from oracle_server.sampling.answer import KNOWLEDGE_MODELLED
from oracle_server.sampling.grids import OPERATOR_AXES
from profiler.model_config import ModelConfig
from profiler.operators import Operator

# Activations are 16 bit; routing weights and expert ids travel with them, 4 bytes each.
_ACTIVATION_BYTES = 2
_ROUTE_BYTES = 8


@dataclass(frozen=True)
class RingLink:
    """One link of a ring of devices: its bandwidth in one direction and the latency of one hop."""

    bytes_per_s: float
    latency_s: float
    source: str

    def all_reduce_ns(self, ranks: int, message_bytes: int) -> float:
        """2 (p - 1) hops, each with a p-th of the message (Patarasuk and Yuan 2009)."""
        return 2 * self.gather_ns(ranks, message_bytes / ranks)

    def gather_ns(self, ranks: int, share_bytes: float) -> float:
        """An all-gather of shares of that size: p - 1 hops with one of them each. A reduce-scatter is the reverse."""
        return 1e9 * (ranks - 1) * (self.latency_s + share_bytes / self.bytes_per_s)


def bundled_link(simulator: Mapping[str, Any]) -> RingLink:
    """The link the bundle's own simulation used: gigabytes per second and nanoseconds."""
    bandwidth, latency = simulator.get("link_bw"), simulator.get("link_latency")
    if not (isinstance(bandwidth, int | float) and isinstance(latency, int | float) and bandwidth > 0 <= latency):
        raise InvalidArgument(
            "the tables hold no communication between ranks, and the bundle names no link: give --link-gbytes-per-s "
            "and --link-latency-us",
            field="link",
        )
    return RingLink(bandwidth * 1e9, latency * 1e-9, "link_bw and link_latency of the bundle's simulator_config.json")


def all_reduce_operator(
    link: RingLink, model: ModelConfig, ranks: int, data_parallel: int, tokens: Sequence[int]
) -> Operator:
    """Two in each layer, after attention and after the feed-forward part; the exchange of experts ends without one."""
    per_step = 2 * model.num_layers - (model.num_moe_layers if data_parallel > 1 else 0)
    message = model.hidden_size * _ACTIVATION_BYTES
    return _per_token(
        "all_reduce", (tokens[0], tokens[-1]), lambda count: per_step * link.all_reduce_ns(ranks, count * message)
    )


def expert_exchange_operator(
    link: RingLink, model: ModelConfig, tensor_parallel: int, data_parallel: int, tokens: Sequence[int]
) -> Operator:
    """Gather, reduce-scatter and the gather among tensor-parallel ranks, in each MoE layer; every rank as many tokens.

    Shares are whole tokens: ceil(tokens / tensor parallel).
    """
    ranks = tensor_parallel * data_parallel
    hidden = model.hidden_size * _ACTIVATION_BYTES
    route = model.experts_per_token * _ROUTE_BYTES

    def cost_ns(count: int) -> float:
        share = -(-count // tensor_parallel)
        layer = link.gather_ns(ranks, share * (hidden + route)) + link.gather_ns(ranks, share * hidden)
        return model.num_moe_layers * (layer + link.gather_ns(tensor_parallel, share * hidden))

    return _per_token("expert_exchange", tuple(range(tokens[0], tokens[-1] + 1)), cost_ns)


def _per_token(name: str, tokens: tuple[int, ...], cost_ns: Callable[[int], float]) -> Operator:
    return Operator(
        name,
        OPERATOR_AXES[name],
        "communication",
        (tokens,),
        np.array([cost_ns(count) for count in tokens]),
        np.full(len(tokens), KNOWLEDGE_MODELLED, dtype=np.int8),
    )
