"""Fits a table of output lengths given prompt lengths from a trace, in the JSON form of step_oracle.v1.LengthTable."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oracle_server.errors import InvalidArgument

_MAX_TRACE_BYTES = 1 << 30
# (prompt tokens, output tokens) of Azure's and of Mooncake's traces.
_COLUMNS = (("ContextTokens", "GeneratedTokens"), ("input_length", "output_length"))
# A bin of fewer requests says little about its tail; its neighbours take it in.
_MIN_REQUESTS_PER_BIN = 30
# Where this share of all requests has the very largest length, a limit cut them: without one it rarely repeats.
_SUSPICIOUS_SHARE = 0.01


@dataclass(frozen=True)
class Trace:
    """Requests in the order of the file; both int64, one entry per request, at least 1 output token each."""

    name: str
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    # Rows without a prompt or without an output (failed requests), which are left out.
    dropped: int


@dataclass(frozen=True)
class LengthFit:
    """`table` is step_oracle.v1.LengthTable as JSON with the field names of the proto."""

    table: Mapping[str, Any]
    requests: int
    dropped: int
    # Share of requests that a limit cut short; their true length is unknown and at least the limit.
    censored_share: float
    prompt_bin_begin: tuple[int, ...]
    bin_requests: tuple[int, ...]


def read_trace(path: Path) -> Trace:
    """Reads an Azure or Mooncake CSV, a Mooncake JSONL, or a `vllm bench serve --save-detailed` JSON, by content."""
    if not path.is_file():
        raise InvalidArgument(f"{path} is no file", field="trace")
    if path.stat().st_size > _MAX_TRACE_BYTES:
        raise InvalidArgument(f"{path} is larger than 1 GiB; cut it into parts", field="trace")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            start = file.read(1)
            file.seek(0)
            pairs = list(_json_pairs(path, file.read()) if start in ("{", "[") else _csv_pairs(path, file))
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{path} is not UTF-8 text: {error}", field="trace") from error
    kept = [(prompt, output) for prompt, output in pairs if prompt >= 1 and output >= 1]
    if not kept:
        raise InvalidArgument(f"{path} holds no request with a prompt and an output", field="trace")
    lengths = np.array(kept, dtype=np.int64)
    return Trace(path.name, lengths[:, 0].copy(), lengths[:, 1].copy(), len(pairs) - len(kept))


def fit_lengths(trace: Trace, *, bins: int = 8, quantiles_per_bin: int = 1025, limit: int | None = None) -> LengthFit:
    """Equidistant quantiles (0 ... 1) of the output length in `bins` prompt bins of about equal numbers of requests.

    `limit` is the max_tokens the trace was recorded under: requests that reached it are right-censored. With one limit
    for all, the product-limit estimate is the plain distribution below it and unknown above, so their quantiles stay at
    the limit. Without `limit` a pile-up at the largest length is taken for one.
    """
    if bins < 1 or quantiles_per_bin < 2:
        raise InvalidArgument("at least one prompt bin and two quantiles are needed", field="bins")
    output = trace.output_tokens if limit is None else np.minimum(trace.output_tokens, limit)
    largest = int(output.max())
    at_largest = float((output == largest).mean())
    is_cut = limit is not None or (at_largest >= _SUSPICIOUS_SHARE and output.size >= 2 * _MIN_REQUESTS_PER_BIN)
    cut_at = limit if limit is not None else largest
    censored = float((output >= cut_at).mean()) if is_cut else 0.0
    begins = _bin_begins(trace.prompt_tokens, bins)
    member = np.searchsorted(np.asarray(begins), trace.prompt_tokens, side="right") - 1
    probabilities = np.linspace(0.0, 1.0, quantiles_per_bin)
    quantiles: list[float] = []
    for index in range(len(begins)):
        values = np.quantile(output[member == index], probabilities)
        quantiles += [round(float(value), 3) for value in values]
    table = {
        "classes": [
            {
                "name": "",
                "prompt_bin_begin": begins,
                "quantile_tokens": quantiles,
                "quantiles_per_bin": quantiles_per_bin,
            }
        ],
        "provenance": _provenance(trace, censored, cut_at if is_cut else None, limit is None),
    }
    counts = np.bincount(member, minlength=len(begins))
    return LengthFit(table, output.size, trace.dropped, censored, tuple(begins), tuple(int(count) for count in counts))


def write_lengths(fit: LengthFit, path: Path) -> None:
    """Writes the table; an existing file is refused, as a table in use must not change under its name."""
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(fit.table, file, separators=(",", ":"))
            file.write("\n")
    except FileExistsError as error:
        raise InvalidArgument(f"{path} exists already; give another name", field="output") from error


def _bin_begins(prompt_tokens: NDArray[np.int64], bins: int) -> list[int]:
    """Ascending lower bounds, the first 0; bins that would hold too few requests are merged with the one below."""
    edges = np.quantile(prompt_tokens, np.linspace(0.0, 1.0, bins + 1)[1:-1], method="higher")
    begins = [0]
    for edge in sorted({int(edge) for edge in edges}):
        inside = int(((prompt_tokens >= begins[-1]) & (prompt_tokens < edge)).sum())
        beyond = int((prompt_tokens >= edge).sum())
        if edge > begins[-1] and min(inside, beyond) >= _MIN_REQUESTS_PER_BIN:
            begins.append(edge)
    return begins


def _provenance(trace: Trace, censored: float, cut_at: int | None, is_guess: bool) -> str:
    sentence = f"{trace.name}: {trace.output_tokens.size} requests"
    if trace.dropped:
        sentence += f", {trace.dropped} without prompt or output left out"
    if cut_at is None:
        return f"{sentence}, none cut by a limit"
    how = "seemingly " if is_guess else ""
    return f"{sentence}, {100 * censored:.1f} % {how}cut at {cut_at} tokens (their true length is unknown)"


def _csv_pairs(path: Path, file: Any) -> Iterator[tuple[int, int]]:
    reader = csv.DictReader(file)
    names = reader.fieldnames or []
    columns = next((pair for pair in _COLUMNS if set(pair) <= set(names)), None)
    if columns is None:
        raise InvalidArgument(
            f"{path} has the columns {', '.join(names)[:200]}; known are ContextTokens,GeneratedTokens (Azure) and "
            "input_length,output_length (Mooncake)",
            field="trace",
        )
    for number, row in enumerate(reader, start=2):
        yield _length(path, number, row[columns[0]]), _length(path, number, row[columns[1]])


def _json_pairs(path: Path, text: str) -> Iterator[tuple[int, int]]:
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and "input_lens" in whole:
        prompts, outputs = whole["input_lens"], whole.get("output_lens")
        if not isinstance(prompts, list) or not isinstance(outputs, list) or len(prompts) != len(outputs):
            raise InvalidArgument(f"{path}: input_lens and output_lens are not lists of equal length", field="trace")
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            yield _length(path, number, prompt), _length(path, number, output)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(f"{path}, line {number}: not JSON ({error})", field="trace") from error
        if not isinstance(row, dict) or "input_length" not in row or "output_length" not in row:
            raise InvalidArgument(
                f"{path}, line {number}: an object with input_length and output_length (Mooncake) is needed, or one "
                "object with input_lens and output_lens (vllm bench serve --save-detailed)",
                field="trace",
            )
        yield _length(path, number, row["input_length"]), _length(path, number, row["output_length"])


def _length(path: Path, number: int, value: Any) -> int:
    try:
        length = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{path}, row {number}: {value!r} is no number of tokens", field="trace") from error
    if length < 0 or length >= 1 << 31 or isinstance(value, bool) or length != float(value):
        raise InvalidArgument(f"{path}, row {number}: {value!r} is no number of tokens", field="trace")
    return length
