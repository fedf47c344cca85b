"""The engine's one stream to the oracle: submit on the engine thread, receive on one reader thread, outlive an outage.

Answers are a pure function of what is asked, so whatever is pending is simply asked again on a new stream.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc

from step_oracle.v1 import oracle_service_pb2 as pb
from vllm_shim.errors import ConfigurationError, OracleLost

if TYPE_CHECKING:
    from step_oracle.v1 import step_pb2
    from vllm_shim.config import ShimConfig

_SERVICE = "/step_oracle.v1.OracleService/"
_CHANNEL_OPTIONS = (
    # A fresh subchannel per engine: the shared pool keeps the back-off of an address that was down (grpcio 1.85.1,
    # seen).
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Slower than the server's minimum, else it answers GOAWAY too_many_pings.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
_BACKOFF_SECONDS = (0.05, 0.5)
_COUNTS_EVERY_NS = 1_000_000_000
_BUCKET_BOUNDS_NS = tuple(1000 * us for us in (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000))


class PendingStep:
    """A step that waits for its answer. Written by the reader thread once, then released to the engine thread."""

    __slots__ = ("_arrived", "answer_ns", "error", "reply", "request", "submit_ns")

    def __init__(self, request: step_pb2.StepRequest, submit_ns: int) -> None:
        self.request = request
        self.submit_ns = submit_ns
        self.reply: step_pb2.StepReply | None = None
        self.error: OracleLost | None = None
        self.answer_ns = 0
        self._arrived = threading.Lock()
        self._arrived.acquire()

    def is_answered(self) -> bool:
        """True once there is a reply or an error."""
        return self.reply is not None or self.error is not None

    def wait(self, timeout_seconds: float) -> bool:
        """Waits for reply or error; False on timeout."""
        if not self.is_answered() and self._arrived.acquire(timeout=timeout_seconds):
            self._arrived.release()
        return self.is_answered()

    def release(self) -> None:
        if self._arrived.locked():
            self._arrived.release()


class OracleStream:
    """Owns the channel, the stream and the reader thread of one engine core.

    Owner of each mutable part: `_pending` and `_outbox` under `_lock`; `_counts` the engine thread; the rest the reader
    thread.
    """

    def __init__(self, config: ShimConfig, channel: grpc.Channel, opening: pb.StreamOpen) -> None:
        self._config = config
        self._channel = channel
        self._opening = opening
        self._lock = threading.Lock()
        self._pending: deque[PendingStep] = deque()
        self._outbox: SimpleQueue[pb.StreamStepsRequest | None] = SimpleQueue()
        self._call: Any = None
        self._closed = threading.Event()
        self._fatal: OracleLost | None = None
        self._generation = 0
        self._reconnects = 0
        self._counts = _fresh_counts()
        self._counts_sent_ns = time.monotonic_ns()
        self._reader = threading.Thread(target=self._read, name="step-oracle-reader", daemon=True)
        self._reader.start()

    def submit(self, request: step_pb2.StepRequest) -> PendingStep:
        """Engine thread: sends one step and returns at once."""
        step = PendingStep(request, time.monotonic_ns())
        message = pb.StreamStepsRequest(steps=[request], min_generation=self._generation)
        if step.submit_ns - self._counts_sent_ns > _COUNTS_EVERY_NS:
            message.counts.CopyFrom(self._take_counts(step.submit_ns))
        with self._lock:
            if self._fatal is not None:
                step.error = self._fatal
                step.release()
                return step
            self._pending.append(step)
            self._outbox.put(message)
        return step

    def wait(self, step: PendingStep) -> step_pb2.StepReply:
        """Engine thread: the reply, or OracleLost once the budget is spent. Under `hold` it waits without limit."""
        budget = self._config.budget_seconds
        while not step.wait(budget):
            silent_seconds = (time.monotonic_ns() - step.submit_ns) * 1e-9
            if self._config.on_lost == "fail" and silent_seconds >= budget:
                self._fail(f"no answer in {silent_seconds:.1f} s, the budget is {budget:g} s")
        if step.reply is None:
            raise step.error or OracleLost("step-oracle: a step was released without an answer")
        return step.reply

    def count_step(self, lateness_ns: int, late_answer_ns: int) -> None:
        """Engine thread: one resolved step; `late_answer_ns` above 0 when the answer came after the deadline."""
        counts = self._counts
        counts.steps += 1
        counts.lateness_sum_ns += lateness_ns
        bucket = 0
        while bucket < len(_BUCKET_BOUNDS_NS) and lateness_ns > _BUCKET_BOUNDS_NS[bucket]:
            bucket += 1
        counts.lateness_buckets[bucket] += 1
        if late_answer_ns > 0:
            counts.late_answers += 1
            counts.late_answer_ns += late_answer_ns

    def close(self) -> None:
        """Ends the stream so that the server frees the engine id at once. Idempotent."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._outbox.put(pb.StreamStepsRequest(counts=self._take_counts(time.monotonic_ns())))
            self._outbox.put(None)
        self._reader.join(timeout=1.0)
        if self._call is not None:
            self._call.cancel()
        self._channel.close()

    def _take_counts(self, now_ns: int) -> pb.ShimCounts:
        counts, self._counts = self._counts, _fresh_counts()
        counts.reconnects, self._reconnects = self._reconnects, 0
        self._counts_sent_ns = now_ns
        return counts

    def _read(self) -> None:
        """Reader thread: one stream after the other until closed or lost."""
        lost_since_ns = time.monotonic_ns()
        backoff = _BACKOFF_SECONDS[0]
        while not self._closed.is_set() and self._fatal is None:
            try:
                for response in self._open():
                    lost_since_ns, backoff = 0, _BACKOFF_SECONDS[0]
                    self._take(response)
                if self._closed.is_set():
                    return
                reason = "the oracle ended the stream"
            except ConfigurationError as error:
                self._fail(str(error))
                return
            except grpc.RpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                if self._closed.is_set():
                    return
                if error.code() not in _RETRIED:
                    self._fail(reason)
                    return
            self._reconnects += 1
            lost_since_ns = lost_since_ns or time.monotonic_ns()
            if self._budget_spent(lost_since_ns):
                self._fail(f"{reason}; the budget of {self._config.budget_seconds:g} s is spent")
                return
            self._closed.wait(backoff * random.uniform(0.8, 1.2))  # noqa: S311
            backoff = min(2 * backoff, _BACKOFF_SECONDS[1])

    def _budget_spent(self, lost_since_ns: int) -> bool:
        """An idle engine waits for its oracle as long as it takes; the budget runs while a step is pending."""
        with self._lock:
            if self._config.on_lost == "hold" or not self._pending:
                return False
            waited_ns = time.monotonic_ns() - max(lost_since_ns, self._pending[0].submit_ns)
        return waited_ns > self._config.budget_seconds * 1e9

    def _open(self) -> Iterator[pb.StreamStepsResponse]:
        """A new stream that presents the engine and asks again whatever is pending."""
        outbox: SimpleQueue[pb.StreamStepsRequest | None] = SimpleQueue()
        with self._lock:
            outbox.put(
                pb.StreamStepsRequest(
                    open=self._opening, steps=[step.request for step in self._pending], min_generation=self._generation
                )
            )
            # Ends the iterator of the broken stream, which blocks in a thread of grpc's.
            self._outbox.put(None)
            self._outbox = outbox
        method = self._channel.stream_stream(
            _SERVICE + "StreamSteps",
            request_serializer=pb.StreamStepsRequest.SerializeToString,
            response_deserializer=pb.StreamStepsResponse.FromString,
        )
        self._call = method(iter(outbox.get, None), metadata=_metadata(self._config))
        return self._call

    def _take(self, response: pb.StreamStepsResponse) -> None:
        """Reader thread: files the replies under their steps."""
        now_ns = time.monotonic_ns()
        if response.HasField("opened"):
            self._generation = max(self._generation, response.opened.generation)
        self._generation = max(self._generation, response.new_generation)
        for reply in response.replies:
            with self._lock:
                step = self._pending[0] if self._pending else None
                if step is not None and step.request.step_index == reply.step_index:
                    self._pending.popleft()
            if step is None or step.request.step_index != reply.step_index:
                asked = "none" if step is None else step.request.step_index
                self._fail(f"answer to step {reply.step_index} while step {asked} is pending")
                return
            self._generation = max(self._generation, reply.generation)
            step.answer_ns = now_ns
            step.reply = reply
            step.release()

    def _fail(self, reason: str) -> None:
        """Ends it for good: every pending step, and every later one, gets the error."""
        with self._lock:
            if self._fatal is not None or self._closed.is_set():
                return
            first = self._pending[0].request.step_index if self._pending else "none"
            error = self._fatal = OracleLost(
                f"step-oracle: oracle {self._config.target} lost at step {first} of engine "
                f"{self._opening.engine.engine_id} (budget {self._config.budget_seconds:g} s): {reason}"
            )
            pending, self._pending = self._pending, deque()
            for step in pending:
                step.error = error
                step.release()
            self._outbox.put(None)
        if self._call is not None:
            self._call.cancel()


def open_channel(config: ShimConfig) -> grpc.Channel:
    """A channel to the oracle; connects lazily."""
    return grpc.insecure_channel(config.target, options=_CHANNEL_OPTIONS)


def call_unary(channel: grpc.Channel, config: ShimConfig, method: str, request: Any, response_type: Any) -> Any:
    """One unary call that waits for the oracle up to the budget; raises grpc.RpcError.

    Not through the generated stubs: those of one grpcio release refuse to load under an older one.
    """
    call = channel.unary_unary(
        _SERVICE + method,
        request_serializer=type(request).SerializeToString,
        response_deserializer=response_type.FromString,
    )
    return call(request, timeout=config.budget_seconds, wait_for_ready=True, metadata=_metadata(config))


def _metadata(config: ShimConfig) -> tuple[tuple[str, str | bytes], ...]:
    """The tenant's token; the file is read at each stream so that a rotated token takes effect."""
    if not config.token_file:
        return ()
    try:
        token = Path(config.token_file).read_text().strip()
    except OSError as error:
        raise ConfigurationError(f"STEP_ORACLE_TOKEN_FILE {config.token_file}: {error.strerror}") from None
    return (("authorization", f"Bearer {token}"),)


def _fresh_counts() -> pb.ShimCounts:
    return pb.ShimCounts(lateness_buckets=[0] * (len(_BUCKET_BOUNDS_NS) + 1))
