"""The random function of step_oracle/v1/step.proto, in pure Python."""

_MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """One splitmix64 step on an unsigned 64-bit integer."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def text_hash(text: str) -> int:
    """FNV-1a, 64 bit, over the UTF-8 bytes."""
    h = 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & _MASK
    return h


def engine_key(seed: int, engine_id: str) -> int:
    """Key of all draws of one engine."""
    return mix(mix(seed) ^ text_hash(engine_id))


def draw(key: int, step_index: int, domain: int, ordinal: int) -> int:
    """The draw, an unsigned 64-bit integer."""
    return mix(mix(mix(key ^ step_index) ^ domain) ^ ordinal)
