"""What the plan makes of an engine's answers: refused, failed, or gone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from oracle_server.errors import InvalidArgument
from profiler.capture import requests as requests_module
from profiler.capture.driver import PlanOptions, drive
from profiler.capture.engine import CapturedEngine
from profiler.capture.launch import CaptureCommand
from profiler.capture.requests import PlanRequests, RequestRefused, ordinary_tokens


class Api(ThreadingHTTPServer):
    """Answers completions with one status, as streams."""

    status = 200
    # What is sent behind the pieces of a stream.
    end = "data: [DONE]\n\n"
    # Bytes of a stream that are announced and never come.
    missing = 0
    asked: list[dict[str, Any]]
    keys: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "v"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        self.server.keys.append(self.headers["Authorization"])
        if self.server.status != 200:
            self._send(self.server.status, {"error": {"message": "this is why", "code": self.server.status}})
        else:
            pieces = [{"choices": [{"index": index, "text": "x"}]} for index in (1, 0)]
            body = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + self.server.end
            self._send_bytes(200, body.encode(), "text/event-stream", self.server.missing)

    def _send(self, status: int, document: dict[str, Any]) -> None:
        self._send_bytes(status, json.dumps(document).encode(), "application/json")

    def _send_bytes(self, status: int, body: bytes, kind: str, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    server = Api(("127.0.0.1", 0), Answer)
    server.asked, server.keys = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def complete(url: str, prompts: int = 3) -> None:
    async def ask() -> None:
        requests = PlanRequests(url, "secret", 1000)
        await requests.open()
        try:
            await requests.complete(prompts, 5, 2)
        finally:
            await requests.close()

    asyncio.run(ask())


def test_prompts_go_out_as_one_request_with_the_engines_key(api: Api) -> None:
    complete(api.url)
    (asked,) = api.asked

    assert api.keys == ["Bearer secret"]
    assert [len(prompt) for prompt in asked["prompt"]] == [5, 5, 5]
    assert (asked["max_tokens"], asked["ignore_eos"], asked["stream"]) == (2, True, True)
    assert asked["prompt"][0] != asked["prompt"][1]
    assert all(250 <= token <= 750 for prompt in asked["prompt"] for token in prompt)


def test_more_prompts_than_vllm_takes_at_once_go_out_as_several_requests(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_module, "_MOST_PROMPTS", 4)
    complete(api.url, prompts=9)

    assert sorted(len(asked["prompt"]) for asked in api.asked) == [1, 4, 4]


@pytest.mark.parametrize(("prompts", "tokens"), [(1, 1), (512, 64), (513, 64), (2048, 8192), (3, 4_000_000)])
def test_every_prompt_is_in_a_request_that_vllm_takes(prompts: int, tokens: int) -> None:
    sizes = requests_module.batches(prompts, tokens)

    assert sum(sizes) == prompts
    assert max(sizes) <= 1024
    assert all(size == 1 or size * tokens * 6 < 32 << 20 for size in sizes)


def test_a_stream_tells_when_each_of_its_prompts_has_a_token(api: Api) -> None:
    async def ask() -> bool:
        requests, begun = PlanRequests(api.url, "none", None), asyncio.Event()
        await requests.generate(2, 5, 9, begun)
        await requests.close()
        return begun.is_set()

    assert asyncio.run(ask())


@pytest.mark.parametrize("status", [400, 422])
def test_a_request_that_is_refused_leaves_the_engine_in_use(api: Api, status: int) -> None:
    api.status = status
    with pytest.raises(RequestRefused, match="this is why"):
        complete(api.url)


@pytest.mark.parametrize(
    ("status", "told"), [(401, "401 .*VLLM_API_KEY"), (403, "403 .*--api-key"), (500, "500 .*its output says why")]
)
def test_any_other_status_ends_the_plan_and_is_told(api: Api, status: int, told: str) -> None:
    api.status = status
    with pytest.raises(InvalidArgument, match=told):
        complete(api.url)


@pytest.mark.parametrize(
    ("end", "missing"), [('data: {"error": {"message": "EngineCore died", "code": 500}}\n\n', 0), ("", 7)]
)
def test_a_stream_that_ends_badly_ends_the_plan_and_is_told(api: Api, end: str, missing: int) -> None:
    api.end, api.missing = end, missing
    with pytest.raises(InvalidArgument, match="does not answer any more"):
        complete(api.url)


def test_an_engine_that_is_gone_is_told(api: Api) -> None:
    with pytest.raises(InvalidArgument, match="does not answer any more"):
        complete("http://127.0.0.1:1")


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 128, 399, 400, 1500, 4400, 150_000, None])
def test_prompts_are_of_ids_the_model_has(vocabulary: int | None) -> None:
    first, last = ordinary_tokens(vocabulary)

    assert 0 <= first <= last
    assert vocabulary is None or last < vocabulary


@pytest.mark.parametrize(
    ("flags", "environment", "key"),
    [
        ((), {}, "none"),
        (("--api-key", "k1", "k2"), {"VLLM_API_KEY": "other"}, "k1"),
        ((), {"VLLM_API_KEY": "other"}, "other"),
    ],
)
def test_the_key_is_the_one_the_engine_was_given(
    tmp_path: Path, flags: tuple[str, ...], environment: dict[str, str], key: str
) -> None:
    with CapturedEngine(CaptureCommand(("/bin/true", *flags), environment, tmp_path)) as engine:
        assert engine.api_key == key


def test_another_server_at_the_engines_address_is_told(tmp_path: Path) -> None:
    with (
        CapturedEngine(CaptureCommand(("/bin/true", "--port", "1234"), {}, tmp_path)) as engine,
        pytest.raises(InvalidArgument, match=r"another server has its address.*--port"),
    ):
        drive(engine, tmp_path, PlanOptions(1.0, 1.0))
