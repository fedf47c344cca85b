"""Damaged messages: bytes at random, or a valid message with some of its fields changed, made from its descriptor."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_MAX_FIELDS = 40
_TEXTS = (
    "",
    "x",
    "\n",
    "\x00",
    "a" * 300,
    "ü" * 90,
    "tenants/default",
    "tenants/nobody/experiments/default",
    "tenants/default/experiments/default",
    "tenants/default/experiments/default/",
    "sha256:" + "0" * 64,
    "../../etc/passwd",
    "dp0/dp0",
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
_SIZES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bytes of a valid message changed, cut out or put in; or nothing of it left."""
    if draw.random() < 0.2:
        return draw.randbytes(draw.choice((0, 1, 7, 60, 900)))
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(changed) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            del changed[at : at + draw.choice((1, 2, 8))]
        elif kind == 1:
            changed[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
        elif kind == 2:
            changed[at : at + 1] = draw.randbytes(1)
        else:
            changed = changed[:at] + changed[: draw.randrange(len(changed) + 1)] + changed[at:]
    return bytes(changed)


def mutate(message: Message, draw: random.Random) -> None:
    """Change one to three fields in place, wherever they are."""
    for _ in range(draw.randint(1, 3)):
        holder = message
        while True:
            fields: list[Any] = list(holder.DESCRIPTOR.fields)
            field = draw.choice(fields)
            inner = _inner(holder, field)
            if inner is None or draw.random() < 0.2:
                break
            holder = draw.choice(inner)
        _change(holder, field, draw)


def _inner(message: Message, field: FieldDescriptor) -> list[Message] | None:
    """The messages in a field that is set; None where there is none to go into."""
    if field.cpp_type != FieldDescriptor.CPPTYPE_MESSAGE or _is_map(field):
        return None
    value = getattr(message, field.name)
    inner = list(value)[:_MAX_FIELDS] if field.is_repeated else [value]
    return [each for each in inner if each.DESCRIPTOR.fields] or None


def _change(message: Message, field: FieldDescriptor, draw: random.Random) -> None:
    value: Any = getattr(message, field.name)
    if _is_map(field):
        value.clear()
        assert field.message_type is not None
        if field.message_type.fields_by_name["value"].cpp_type == FieldDescriptor.CPPTYPE_STRING:
            for _ in range(draw.choice((0, 1, 3, 70))):
                value[draw.choice(_TEXTS) + str(draw.random())] = draw.choice(_TEXTS)
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        if field.is_repeated:
            _change_repeated(value, draw)
        elif draw.random() < 0.5:
            message.ClearField(field.name)
        else:
            value.SetInParent()
    elif field.is_repeated:
        kept = list(value)[: draw.choice((0, 1, 5, _MAX_FIELDS))]
        fresh = [_scalar(field, draw) for _ in range(draw.choice((0, 1, 2, _MAX_FIELDS)))]
        del value[:]
        value.extend(draw.sample(kept + fresh, len(kept + fresh)))
    else:
        setattr(message, field.name, _scalar(field, draw))


def _change_repeated(values: Any, draw: random.Random) -> None:
    kind = draw.randrange(3)
    if kind == 0 and len(values):
        del values[draw.randrange(len(values))]
    elif kind == 1 and len(values):
        values.add().CopyFrom(draw.choice(values))
    else:
        for _ in range(draw.choice((1, 2, _MAX_FIELDS))):
            values.add()


def _scalar(field: FieldDescriptor, draw: random.Random) -> Any:
    kind = field.cpp_type
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return draw.randbytes(draw.choice((0, 1, 50)))
        return draw.choice(_TEXTS)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind in _SIZES:
        low, high = _SIZES[kind]
        around = draw.choice((0, low, high, 1 << draw.randrange(63), draw.randrange(300)))
        return min(max(around + draw.randint(-1, 1), low), high)
    return draw.choice(_FLOATS)


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
