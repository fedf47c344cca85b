"""What a plan asks of the engine it drives, over the engine's own OpenAI API."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from oracle_server.errors import InvalidArgument

_SEED = 20260921
_TIMEOUT_SECONDS = 600.0
# Ids of ordinary tokens in any large vocabulary: special ones lie at its ends.
_FIRST_TOKEN, _LAST_TOKEN = 300, 4000
# vLLM takes 1024 prompts and 32 MiB in a request (0.33.0, envs.py: MAX_COMPLETION_PROMPTS, HTTP_MAX_REQUEST_BODY_SIZE),
# and a token is 6 bytes at most.
_MOST_PROMPTS, _MOST_TOKENS = 512, 2 << 20
# What an engine answers to a request it will not serve, while it goes on serving others.
_REFUSALS = (400, 413, 422)


class RequestRefused(Exception):
    """The engine will not serve this request; it serves others. The text is the engine's."""


class PlanRequests:
    """Completions of random prompts. Used on one event loop.

    Prompts that belong together are sent as one request as far as vLLM takes them: they reach the scheduler together,
    and no number of them is limited by a pool of connections. Answers are streamed, as clients of chats take them: with
    answers in one piece decode steps of a CPU engine took 7 % longer (README).
    """

    def __init__(self, base_url: str, api_key: str, vocabulary: int | None) -> None:
        """`vocabulary`: how many token ids the model has, None where that is not known. Raises InvalidArgument."""
        try:
            import openai
        except ModuleNotFoundError:
            message = "--plan talks to the engine with openai: pip install openai"
            raise InvalidArgument(message, field="command") from None
        self._openai = openai
        self._failures: tuple[type[Exception], ...] = (openai.OpenAIError, *_transport_errors())
        self._client = openai.AsyncOpenAI(
            base_url=f"{base_url}/v1", api_key=api_key, max_retries=0, timeout=_TIMEOUT_SECONDS
        )
        self._tokens = random.Random(_SEED)  # noqa: S311
        self._ids = ordinary_tokens(vocabulary)
        self._model = ""

    async def open(self) -> None:
        """Ask for the model's name."""
        with self._told():
            self._model = (await self._client.models.list()).data[0].id

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, prompts: int, prompt_tokens: int, output_tokens: int) -> None:
        """Until all of them have all their tokens. Raises RequestRefused, and InvalidArgument where nothing more is
        to be expected of the engine."""
        await self.generate(prompts, prompt_tokens, output_tokens, asyncio.Event())

    async def generate(self, prompts: int, prompt_tokens: int, output_tokens: int, all_generate: asyncio.Event) -> None:
        """The same; the event is set when each of them has a token. Cancelling it ends them in the engine: vLLM takes a
        client that is gone as an abort."""
        left = [prompts]

        def begins() -> None:
            left[0] -= 1
            if not left[0]:
                all_generate.set()

        await _together(
            [self._generate(batch, prompt_tokens, output_tokens, begins) for batch in batches(prompts, prompt_tokens)]
        )

    async def _generate(self, prompts: int, prompt_tokens: int, output_tokens: int, begins: Callable[[], None]) -> None:
        begun: set[int] = set()
        with self._told():
            stream = await self._client.completions.create(
                **self._request(prompts, prompt_tokens, output_tokens), stream=True
            )
            async for piece in stream:
                for choice in piece.choices:
                    if choice.index not in begun:
                        begun.add(choice.index)
                        begins()

    def _request(self, prompts: int, prompt_tokens: int, output_tokens: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": [self._prompt(prompt_tokens) for _ in range(prompts)],
            "max_tokens": output_tokens,
            "extra_body": {"ignore_eos": True},
        }

    def _prompt(self, tokens: int) -> list[int]:
        """Random ids: two prompts share no beginning, so the prefix cache answers none of them."""
        return [self._tokens.randint(*self._ids) for _ in range(tokens)]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The client's errors as what the plan can do about them."""
        openai = self._openai
        try:
            yield
        except openai.APIStatusError as error:
            if error.status_code in _REFUSALS:
                raise RequestRefused(error.message) from None
            hint = "; its output says why"
            if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
                hint = "; give the key with --api-key in the engine's command, or in VLLM_API_KEY"
            message = f"the engine answers {error.status_code} to the plan's requests ({error.message}){hint}"
            raise InvalidArgument(message, field="engine") from None
        except openai.APITimeoutError:
            message = f"the engine did not answer within {_TIMEOUT_SECONDS:.0f} s; its output says why"
            raise InvalidArgument(message, field="engine") from None
        except self._failures as error:
            message = f"the engine does not answer any more ({error}); its output says why"
            raise InvalidArgument(message, field="engine") from None


def _transport_errors() -> Iterator[type[Exception]]:
    """What a stream that breaks off raises in clients that do not make their own error of it: openai 2 stands on httpx,
    openai 3 on httpx2."""
    for name in ("httpx", "httpx2"):
        with contextlib.suppress(ModuleNotFoundError):
            yield importlib.import_module(name).HTTPError


def batches(prompts: int, prompt_tokens: int) -> list[int]:
    """How many prompts go out in each request."""
    most = max(1, min(_MOST_PROMPTS, _MOST_TOKENS // prompt_tokens))
    return [min(most, prompts - sent) for sent in range(0, prompts, most)]


async def _together(sending: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of them; where one fails the others are cancelled, and its error is raised."""
    tasks = [asyncio.create_task(each) for each in sending]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def ordinary_tokens(vocabulary: int | None) -> tuple[int, int]:
    """First and last id to make prompts of, away from both ends of the vocabulary."""
    if vocabulary is None:
        return _FIRST_TOKEN, _LAST_TOKEN
    first = min(_FIRST_TOKEN, vocabulary // 4)
    return first, max(first, min(_LAST_TOKEN, 3 * vocabulary // 4))
