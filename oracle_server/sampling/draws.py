"""The random function of step.proto, once for Python integers and once for kernels."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from oracle_server.sampling.jit import compiled

DOMAIN_FRACTION: Final = 0
DOMAIN_RESIDUAL: Final = 1
DOMAIN_NEIGHBOR: Final = 2
DOMAIN_ACCEPTANCE: Final = 3
DOMAIN_OUTPUT_LENGTH: Final = 4
DOMAIN_FAULT: Final = 5

_MASK: Final = (1 << 64) - 1
_RANK: Final = re.compile(r"/dp[0-9]+\Z")


def engine_key(seed: int, engine_id: str) -> int:
    """Key of all draws of one engine under one seed, as an unsigned 64-bit integer."""
    return mix(mix(seed) ^ text_hash(engine_id))


def draw(key: int, step_index: int, domain: int, ordinal: int) -> int:
    """One draw, uniform over the unsigned 64-bit integers."""
    return mix(mix(mix(key ^ step_index) ^ domain) ^ ordinal)


def request_draw(seed: int, request_key: str) -> int:
    """The draw of a request's output length: it follows the request, not the step or the engine."""
    return draw(mix(mix(seed) ^ text_hash(request_key)), 0, DOMAIN_OUTPUT_LENGTH, 0)


def fraction_draw(salt: str, engine_id: str) -> float:
    """Where a vLLM server stands in [0, 1) for the stable fractions of a salt; the same for all its DP ranks."""
    return unit(draw(mix(text_hash(salt) ^ text_hash(server_of(engine_id))), 0, DOMAIN_FRACTION, 0))


def server_of(engine_id: str) -> str:
    """The vLLM server an engine belongs to: its id without a DP rank."""
    return _RANK.sub("", engine_id)


def index_below(value: int, size: int) -> int:
    """A draw as an index in [0, size); size at most 2^32."""
    return ((value >> 32) * size) >> 32


def unit(value: int) -> float:
    """A draw as a real number in [0, 1), a multiple of 2^-53."""
    return (value >> 11) * 2.0**-53


def mix(z: int) -> int:
    """One splitmix64 step (Steele, Lea and Flood, OOPSLA 2014, figure 16)."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def text_hash(text: str) -> int:
    """64-bit FNV-1a over the UTF-8 bytes of `text`."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    return value


def signed(value: int) -> int:
    """An unsigned 64-bit integer with its bits read as signed, which is how integers enter a kernel.

    numba types a Python integer by its value (int64 below 2^63, uint64 above): one sign keeps one compiled variant.
    """
    return value - (1 << 64) if value >> 63 else value


@compiled
def mix_u64(z: np.uint64) -> np.uint64:
    """`mix` on uint64."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def draw_u64(key: int, step_index: int, domain: int, ordinal: int) -> np.uint64:
    """`draw` in a kernel: arguments are int64 with the bits of the unsigned value, the result is uint64."""
    return mix_u64(mix_u64(mix_u64(np.uint64(key) ^ np.uint64(step_index)) ^ np.uint64(domain)) ^ np.uint64(ordinal))


@compiled
def index_below_u64(value: np.uint64, size: int) -> int:
    """`index_below` in a kernel."""
    return np.int64(((value >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))  # type: ignore[return-value]


@compiled
def unit_u64(value: np.uint64) -> float:
    """`unit` in a kernel; the product with 2^-53 is exact."""
    return np.float64(value >> np.uint64(11)) * 2.0**-53
