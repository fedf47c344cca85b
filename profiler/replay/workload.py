"""Requests from files (ShareGPT-like JSONL with token ids, Mooncake JSONL, Azure CSV) or as a closed loop."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

from oracle_server.errors import InvalidArgument
from profiler.replay.job import Request
from profiler.replay.prompts import BLOCK_TOKENS

_MAX_BYTES = 1 << 30
_TOKENS_LIMIT = 1 << 31


def read_workload(path: Path, limit: int | None = None) -> list[Request]:
    """The requests of a file in the order of their arrivals, which begin at 0; the format is told by the content.

    | format | a line holds | prompts |
    | --- | --- | --- |
    | ShareGPT-like JSONL | input_toks, output_toks, arrival_time_ns, input_tok_ids | the real token ids |
    | Mooncake JSONL | timestamp (ms), input_length, output_length, hash_ids | equal ids are equal blocks of 512 |
    | Azure CSV | TIMESTAMP, ContextTokens, GeneratedTokens | made up, nothing shared |
    | Mooncake lengths CSV | timestamp_ms, input_length, output_length | made up, nothing shared |
    """
    if not path.is_file():
        raise InvalidArgument(f"{path} is no file", field="requests")
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidArgument(f"{path} is larger than 1 GiB; cut it into parts", field="requests")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = file.read(1)
            file.seek(0)
            rows = _json_requests(path, file) if start == "{" else _csv_requests(path, file)
            requests = [request for request, _ in zip(rows, range(limit), strict=False)] if limit else list(rows)
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8 text: {error}", field="requests") from error
    if not requests:
        raise InvalidArgument(f"{path} holds no request", field="requests")
    return _from_zero(requests)


def closed_loop(count: int, prompt_tokens: int, output_tokens: int) -> list[Request]:
    """`count` requests of one shape that share nothing; when each is sent is up to the loop."""
    if min(count, prompt_tokens, output_tokens) < 1:
        raise InvalidArgument("a closed loop needs at least one request, one prompt token and one output token")
    return [Request(f"loop-{i}", prompt_tokens, output_tokens) for i in range(count)]


def _from_zero(requests: list[Request]) -> list[Request]:
    first = min(request.arrival_ns for request in requests)
    moved = [_moved(request, request.arrival_ns - first) for request in requests]
    return sorted(moved, key=lambda request: request.arrival_ns)


def _moved(request: Request, arrival_ns: int) -> Request:
    return Request(
        request.request_id,
        request.prompt_tokens,
        request.output_tokens,
        arrival_ns,
        request.prompt_token_ids,
        request.blocks,
        request.admit_step,
    )


def _json_requests(path: Path, file: Any) -> Iterator[Request]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(f"{path}, line {number}: not JSON ({error})", field="requests") from error
        if isinstance(row, dict) and "input_tok_ids" in row:
            yield _sharegpt(path, number, row)
        elif isinstance(row, dict) and "input_length" in row:
            yield _mooncake(path, number, row)
        else:
            raise InvalidArgument(
                f"{path}, line {number}: an object with input_tok_ids, output_toks and arrival_time_ns (ShareGPT-like) "
                "or with timestamp, input_length and output_length (Mooncake) is needed",
                field="requests",
            )


def _sharegpt(path: Path, number: int, row: dict[str, Any]) -> Request:
    token_ids = row["input_tok_ids"]
    if not isinstance(token_ids, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in token_ids):
        raise InvalidArgument(f"{path}, line {number}: input_tok_ids is no list of token ids", field="requests")
    prompt = _count(path, number, row.get("input_toks", len(token_ids)), "input_toks")
    if prompt != len(token_ids):
        raise InvalidArgument(
            f"{path}, line {number}: input_toks is {prompt} but there are {len(token_ids)} token ids", field="requests"
        )
    output = _count(path, number, row.get("output_toks"), "output_toks")
    arrival = _count(path, number, row.get("arrival_time_ns"), "arrival_time_ns", least=0, limit=1 << 62)
    return Request(f"bench-{number - 1}", prompt, output, arrival, tuple(token_ids))


def _mooncake(path: Path, number: int, row: dict[str, Any]) -> Request:
    prompt = _count(path, number, row["input_length"], "input_length")
    output = _count(path, number, row.get("output_length"), "output_length")
    arrival_ms = _count(path, number, row.get("timestamp"), "timestamp", least=0, limit=1 << 42)
    blocks = row.get("hash_ids") or ()
    if blocks:
        if not all(type(block) is int and 0 <= block < 1 << 62 for block in blocks):
            raise InvalidArgument(f"{path}, line {number}: hash_ids is no list of block ids", field="requests")
        if len(blocks) * BLOCK_TOKENS < prompt:
            raise InvalidArgument(
                f"{path}, line {number}: {len(blocks)} hash_ids of {BLOCK_TOKENS} tokens do not cover {prompt} tokens",
                field="requests",
            )
    return Request(f"line-{number}", prompt, output, arrival_ms * 1_000_000, blocks=tuple(blocks))


def _csv_requests(path: Path, file: Any) -> Iterator[Request]:
    reader = csv.DictReader(file)
    names = set(reader.fieldnames or ())
    azure = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= names
    if not azure and not {"timestamp_ms", "input_length", "output_length"} <= names:
        raise InvalidArgument(
            f"{path} has the columns {', '.join(sorted(names))[:200]}; known are TIMESTAMP,ContextTokens,"
            "GeneratedTokens (Azure) and timestamp_ms,input_length,output_length (Mooncake)",
            field="requests",
        )
    for number, row in enumerate(reader, start=2):
        columns = ("ContextTokens", "GeneratedTokens") if azure else ("input_length", "output_length")
        prompt = _count(path, number, row[columns[0]], columns[0], least=0)
        output = _count(path, number, row[columns[1]], columns[1], least=0)
        if azure:
            arrival_ns = _timestamp_ns(path, number, row["TIMESTAMP"])
        else:
            arrival_ns = _count(path, number, row["timestamp_ms"], "timestamp_ms", least=0, limit=1 << 42) * 1_000_000
        # Traces list failed requests without a prompt or an answer; an engine never saw them.
        if prompt and output:
            yield Request(f"line-{number}", prompt, output, arrival_ns)


def _timestamp_ns(path: Path, number: int, text: str) -> int:
    """Nanoseconds since 1970 of "2023-11-16 18:17:03.9799600", exactly."""
    whole, _, fraction = (text or "").partition(".")
    try:
        seconds = int(datetime.strptime(whole, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp())
        return seconds * 1_000_000_000 + int(Fraction(f"0.{fraction or 0}") * 1_000_000_000)
    except ValueError:
        raise InvalidArgument(
            f"{path}, row {number}: TIMESTAMP is {text!r}; it has the form 2023-11-16 18:17:03.9799600",
            field="requests",
        ) from None


def _count(path: Path, number: int, value: Any, name: str, least: int = 1, limit: int = _TOKENS_LIMIT) -> int:
    try:
        count = int(value)
        exact = not isinstance(value, bool) and (isinstance(value, str) or count == value)
    except (TypeError, ValueError, OverflowError):
        count, exact = 0, False
    if not exact or not least <= count < limit:
        raise InvalidArgument(
            f"{path}, line {number}: {name} is {value!r}; a whole number from {least} on is needed", field="requests"
        )
    return count
