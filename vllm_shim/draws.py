"""What the shim needs of the random function of step_oracle/v1/step.proto."""

import numpy as np

# Steps whose draws are worked out at once.
_BLOCK = 128
_MASK = (1 << 64) - 1


def text_hash(text: str) -> int:
    """FNV-1a, 64 bit, over the UTF-8 bytes."""
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & _MASK
    return h


class StepDraws:
    """draw(key, step, domain, ordinal 0) of one engine's steps, which ask for it in about their order. One thread's."""

    __slots__ = ("_begin", "_block", "_domain", "key")

    def __init__(self, key: int, domain: int) -> None:
        self.key, self._domain = key, np.uint64(domain)
        self._begin, self._block = 0, list[int]()

    def of(self, step_index: int) -> int:
        """The draw, an unsigned 64-bit integer."""
        at = step_index - self._begin
        if not 0 <= at < len(self._block):
            self._begin, at = step_index, 0
            steps = np.uint64(step_index) + np.arange(_BLOCK, dtype=np.uint64)
            self._block = _mix(_mix(_mix(np.uint64(self.key) ^ steps) ^ self._domain)).tolist()
        return self._block[at]


def _mix(z: np.ndarray) -> np.ndarray:
    """One splitmix64 step on each unsigned 64-bit integer."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
