"""The engine's one stream to the oracle: submit on the engine thread, receive on one reader thread, outlive an outage.

Answers are a pure function of what is asked, so whatever is pending is simply asked again on a new stream, at whichever
replica.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import grpc

from step_oracle.v1 import oracle_service_pb2 as pb
from vllm_shim.errors import ConfigurationError, OracleLost
from vllm_shim.lease import LeasedReply, LeaseTable, Reply

if TYPE_CHECKING:
    from step_oracle.v1 import step_pb2
    from vllm_shim.config import ShimConfig
    from vllm_shim.step_shape import DecodeStep

_SERVICE = "step_oracle.v1.OracleService"
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
    # Each call to the next address that is connected and says that it serves: one that starts or drains says it does
    # not, and one that knows no health checks counts as serving.
    (
        "grpc.service_config",
        f'{{"loadBalancingConfig": [{{"round_robin": {{}}}}], "healthCheckConfig": {{"serviceName": "{_SERVICE}"}}}}',
    ),
)
_RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
# What each failure beyond the first at every replica adds to the pause before the next try, and the longest pause.
_BACKOFF_SECONDS = (0.05, 0.5)
_COUNTS_EVERY_SECONDS = 1.0
# How long a thread of this process waits for Python.
_USUAL_SECONDS = sys.getswitchinterval()
_BUCKET_BOUNDS_NS = tuple(1000 * us for us in (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000))


class Replica:
    """One of the servers that the target names, and the channel to it, which connects when it is used."""

    def __init__(self, config: ShimConfig, target: str) -> None:
        self._config, self._target = config, target
        self._channel: grpc.Channel | None = _open_channel(config, target)

    @property
    def channel(self) -> grpc.Channel:
        if self._channel is None:
            self._channel = _open_channel(self._config, self._target)
        return self._channel

    def leave(self) -> None:
        """Ends the connection. The next one looks the name up again, and reads the files of certificates."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None


class PendingStep:
    """A step that waits for its answer. Written by the reader thread once, then released to the engine thread.

    One with a lease is answered from it as soon as the steps before it are answered: on the spot, and then it has no
    request, or in its turn.
    """

    __slots__ = ("_arrived", "answer_ns", "error", "lease", "reply", "request", "submit_ns")

    def __init__(self, request: step_pb2.StepRequest | None, submit_ns: int, lease: Any = None) -> None:
        self.request: Any = request
        self.submit_ns = submit_ns
        self.lease = lease
        self.reply: Reply | None = None
        self.error: OracleLost | None = None
        self.answer_ns = 0
        # What is answered on the spot has nothing to wait for.
        self._arrived: Any = None
        if request is not None:
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
    """Owns the stream and the reader thread of one engine core, and its replicas.

    Owner of each mutable part: `_pending`, `_outbox` and `_reconnects` under `_lock`; `_leases` and `_is_hurried` the
    engine thread; `_resolved` it fills, whoever takes the counts empties; `_unheard_since_ns` grpc's thread sets, the
    reader thread clears; the rest the reader thread. `_fail` may run on the engine thread: whatever it overwrites of
    the reader's, nothing is answered any more.
    """

    def __init__(
        self,
        config: ShimConfig,
        replicas: deque[Replica],
        opening: pb.StreamOpen,
        *,
        hurried_seconds: float = _USUAL_SECONDS,
    ) -> None:
        """`hurried_seconds`: the process's switch interval while an answer is awaited; for the only engine in it."""
        self._config = config
        self._replicas = replicas
        self._opening = opening
        self._lock = threading.Lock()
        self._pending: deque[PendingStep] = deque()
        self._outbox: SimpleQueue[pb.StreamStepsRequest | None] = SimpleQueue()
        self._call: Any = None
        self._closed = threading.Event()
        self._fatal: OracleLost | None = None
        # Highest generation seen and the leases of it: none holds longer than one such pair is here.
        self._era: tuple[int, deque[step_pb2.Lease]] = (0, deque())
        self._leases, self._leases_era = LeaseTable(), self._era
        # When the first message went out since the oracle was last heard; 0: none has. It answers every message.
        self._unheard_since_ns = 0
        # Steps resolved since counts were taken: lateness, late answer, reply.
        self._resolved: deque[tuple[int, int, Reply | None]] = deque()
        self._reconnects = 0
        self._spins, self._hurried_seconds = config.wait == "spin", hurried_seconds
        # One that spins through its steps lets nobody in by itself.
        self._hurry(self._spins)
        self._reader = threading.Thread(target=self._read, name="step-oracle-reader", daemon=True)
        self._reader.start()

    def submit(self, request: step_pb2.StepRequest, lease: Any = None) -> PendingStep:
        """Engine thread: sends one step, or keeps it for its lease until its turn comes; returns at once."""
        self._take_leases()
        step = PendingStep(request, time.monotonic_ns(), lease)
        with self._lock:
            if self._fatal is not None:
                step.error = self._fatal
                step.release()
                return step
            self._pending.append(step)
            self._hurry(True)
            if lease is None:
                # Those that wait for their turn go first: messages keep the order of the steps.
                self._send([other for other in self._pending if other.lease is not None or other is step])
            self._answer_leased()
        return step

    def submit_decode(
        self, step_index: int, step: DecodeStep, request: Callable[[DecodeStep], step_pb2.StepRequest]
    ) -> PendingStep:
        """The same for a decode-only step: answered from a lease where one holds, else `request(step)` is sent.

        Not before the steps before it are answered: one of them could bring a newer generation, and an engine never
        goes back.
        """
        # Read before the era: what has been answered by now shows in the generation.
        waits = bool(self._pending)
        if self._era is not self._leases_era or self._leases_era[1]:
            self._take_leases()
        lease = self._leases.find(
            step.num_requests, step.context_tokens, step.max_context_tokens, step.previous_prefill_tokens
        )
        now_ns = time.monotonic_ns()
        if lease is not None and self._unheard_since_ns and self._is_silent(now_ns):
            lease = None
        if lease is None or waits:
            return self.submit(request(step), lease)
        answered = PendingStep(None, now_ns, lease)
        answered.answer_ns = now_ns
        answered.reply = LeasedReply(lease, step_index, step.context_tokens, step.max_context_tokens)
        return answered

    def _take_leases(self) -> None:
        """Engine thread: what has arrived goes into the table; what is of another era goes."""
        if self._era is not self._leases_era:
            self._leases_era = self._era
            self._leases.clear()
        while arrived := self._leases_era[1]:
            self._leases.take(arrived.popleft())

    def _is_silent(self, now_ns: int) -> bool:
        """True where the oracle has said nothing for the whole budget: a lease must not hide that it is lost."""
        silent_seconds = (now_ns - since_ns) * 1e-9 if (since_ns := self._unheard_since_ns) else 0.0
        if silent_seconds < self._config.budget_seconds:
            return False
        if self._config.on_lost == "fail":
            self._fail(f"nothing heard in {silent_seconds:.1f} s, the budget is {self._config.budget_seconds:g} s")
        return True

    def _send(self, steps: list[PendingStep]) -> None:
        for step in steps:
            step.lease = None
        requests = [step.request for step in steps]
        self._outbox.put(pb.StreamStepsRequest(steps=requests, min_generation=self._era[0]))

    def _answer_leased(self) -> None:
        """Steps with a lease that nothing unanswered is before any more; sent where their generation is over."""
        while self._pending and (lease := self._pending[0].lease):
            if lease.generation != self._era[0]:
                self._send(list(self._pending))
                return
            step = self._pending.popleft()
            shape = step.request.shape
            step.answer_ns = time.monotonic_ns()
            step.reply = LeasedReply(
                lease, step.request.step_index, shape.decode_context_tokens, shape.max_decode_context_tokens
            )
            step.release()

    def _hurry(self, is_hurried: bool) -> None:
        """From a step that is asked for to one that is resolved while none waits for an answer; the engine thread's.

        At other times the engine's threads take turns as without us: in a hurry vLLM's own thread for output comes
        before the next step, 2 ms a step on a slow core (measured).
        """
        self._is_hurried = is_hurried
        sys.setswitchinterval(self._hurried_seconds if is_hurried else _USUAL_SECONDS)

    def wait(self, step: PendingStep) -> Reply:
        """Engine thread: the reply, or OracleLost once the budget is spent. Under `hold` it waits without limit."""
        budget = self._config.budget_seconds
        while not step.wait(budget):
            silent_seconds = (time.monotonic_ns() - step.submit_ns) * 1e-9
            if self._config.on_lost == "fail" and silent_seconds >= budget:
                self._fail(f"no answer in {silent_seconds:.1f} s, the budget is {budget:g} s")
        if step.reply is None:
            raise step.error or OracleLost("step-oracle: a step was released without an answer")
        return step.reply

    def count_step(self, lateness_ns: int, late_answer_ns: int, reply: Reply | None = None) -> None:
        """Engine thread: one resolved step; `late_answer_ns` above 0 when the answer came after the deadline.

        Added up where counts are taken: the engine thread keeps it and goes on.
        """
        if self._is_hurried and not (self._pending or self._spins):
            self._hurry(False)
        self._resolved.append((lateness_ns, late_answer_ns, reply))

    def close(self) -> None:
        """Ends the stream so that the server frees the engine id at once. Idempotent."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._hurry(False)
        self._outbox.put(pb.StreamStepsRequest(counts=self._take_counts()))
        self._outbox.put(None)
        self._reader.join(timeout=1.0)
        if self._call is not None:
            self._call.cancel()
        for replica in self._replicas:
            replica.leave()

    def _take_counts(self) -> pb.ShimCounts:
        # The fields of ShimCounts: counting in a message costs twice as much.
        counts: dict[str, Any] = dict.fromkeys(pb.ShimCounts.DESCRIPTOR.fields_by_name, 0) | {
            "lateness_buckets": [0] * (len(_BUCKET_BOUNDS_NS) + 1),
            "leased_steps_by_support": [0] * 4,
        }
        with self._lock:
            counts["reconnects"], self._reconnects = self._reconnects, 0
            # Those that are here now: the engine thread adds to them meanwhile.
            resolved = [self._resolved.popleft() for _ in range(len(self._resolved))]
        for lateness_ns, late_answer_ns, reply in resolved:
            counts["steps"] += 1
            counts["lateness_sum_ns"] += lateness_ns
            counts["lateness_buckets"][bisect_left(_BUCKET_BOUNDS_NS, lateness_ns)] += 1
            counts["late_answers"] += late_answer_ns > 0
            counts["late_answer_ns"] += max(0, late_answer_ns)
            if isinstance(reply, LeasedReply):
                counts["leased_steps"] += 1
                counts["last_leased_step_index"] = reply.step_index
                counts["leased_steps_by_support"][reply.support] += 1
        return pb.ShimCounts(**counts)

    def _read(self) -> None:
        """Reader thread: one stream after the other until closed or lost."""
        lost_since_ns, failures = time.monotonic_ns(), 0
        while not self._closed.is_set() and self._fatal is None:
            try:
                for response in self._open():
                    lost_since_ns = 0
                    # One that opens and answers nothing is failing still.
                    failures *= response.HasField("opened") and not response.replies
                    self._take(response)
                if not lost_since_ns:
                    # Ended politely, for the load to follow the replicas there are: what it granted is as good as ever.
                    lost_since_ns = time.monotonic_ns()
                    if len(self._replicas) == 1:
                        # Kept, it would stay open beside the one that gRPC opens when its server finds it old. Of
                        # several targets the next one is asked, over a connection that is warm.
                        self._replicas[0].leave()
                    continue
                reason = "the oracle ended the stream"
            except ConfigurationError as error:
                self._fail(str(error))
                return
            except grpc.RpcError as error:
                reason = f"{error.code().name}: {error.details()}"
                # An id that is taken is so at the opening: a stream that was open may have ended for an earlier one of
                # this engine, which a replica that hung has come upon late.
                if error.code() not in _RETRIED and (
                    lost_since_ns or error.code() is not grpc.StatusCode.ALREADY_EXISTS
                ):
                    self._fail(reason)
                    return
            if lost_since_ns and self._config.tls_ca:
                # Not even opened: its certificate may be one that was replaced meanwhile, or was being replaced.
                self._replicas[0].leave()
            self._era = (self._era[0], deque())
            with self._lock:
                self._reconnects += 1
            lost_since_ns = lost_since_ns or time.monotonic_ns()
            if self._budget_spent(lost_since_ns):
                self._fail(f"{reason}; the budget of {self._config.budget_seconds:g} s is spent")
                return
            failures += 1
            # The next replica at once, each of them, then ever more slowly.
            pause = min(_BACKOFF_SECONDS[0] * max(0, failures - len(self._replicas)), _BACKOFF_SECONDS[1])
            self._closed.wait(pause * random.uniform(0.8, 1.2))  # noqa: S311

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
            # What waits for its turn is asked: the answers before it come on this stream.
            for step in self._pending:
                step.lease = None
            outbox.put(
                pb.StreamStepsRequest(
                    open=self._opening,
                    steps=[step.request for step in self._pending],
                    min_generation=self._era[0],
                )
            )
            # Ends the iterator of the broken stream, which blocks in a thread of grpc's.
            self._outbox.put(None)
            self._outbox = outbox
        self._replicas.rotate()
        method = self._replicas[0].channel.stream_stream(
            f"/{_SERVICE}/StreamSteps",
            request_serializer=pb.StreamStepsRequest.SerializeToString,
            response_deserializer=pb.StreamStepsResponse.FromString,
        )
        self._call = method(self._messages(outbox), metadata=_metadata(self._config))
        return self._call

    def _messages(self, outbox: SimpleQueue[pb.StreamStepsRequest | None]) -> Iterator[pb.StreamStepsRequest]:
        """grpc's own thread: what is to be sent, once a second with counts, which go alone where nothing else does."""
        opened_ns, counted_at = time.monotonic_ns(), time.monotonic()
        while True:
            try:
                message = outbox.get(timeout=_COUNTS_EVERY_SECONDS)
            except Empty:
                # A replica that hangs, or whose host is gone, is left for another while there is budget left; each gets
                # twice as long, so that one that is slow is heard in the end.
                here_ns, in_all_ns = (time.monotonic_ns() - max(self._unheard_since_ns, ns) for ns in (opened_ns, 0))
                if self._unheard_since_ns and here_ns > max(self._config.budget_seconds * 1e9 / 3, in_all_ns / 2):
                    self._call.cancel()
                if not self._resolved:
                    continue
                message = pb.StreamStepsRequest()
            if message is None:
                return
            if not message.HasField("counts") and time.monotonic() - counted_at >= _COUNTS_EVERY_SECONDS:
                counted_at = time.monotonic()
                message.counts.CopyFrom(self._take_counts())
            self._unheard_since_ns = self._unheard_since_ns or time.monotonic_ns()
            yield message

    def _take(self, response: pb.StreamStepsResponse) -> None:
        """Reader thread: files the replies under their steps."""
        now_ns = time.monotonic_ns()
        self._unheard_since_ns = 0
        self._see(max(response.opened.generation, response.new_generation))
        for reply in response.replies:
            with self._lock:
                step = self._pending[0] if self._pending else None
                asked = "none" if step is None else step.request.step_index
                if step is not None and asked == reply.step_index:
                    self._see(reply.generation)
                    self._pending.popleft()
                    step.answer_ns = now_ns
                    step.reply = reply
                    if reply.HasField("lease") and reply.lease.generation == self._era[0]:
                        self._era[1].append(reply.lease)
                    step.release()
                    self._answer_leased()
                    continue
            self._fail(f"answer to step {reply.step_index} while step {asked} is pending")
            return

    def _see(self, generation: int) -> None:
        """Reader thread: leases of older generations are dead."""
        if generation > self._era[0]:
            self._era = (generation, deque())

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
            # No lease answers what comes after.
            self._era = (self._era[0], deque())
            pending, self._pending = self._pending, deque()
            for step in pending:
                step.error = error
                step.release()
            self._outbox.put(None)
        if self._call is not None:
            self._call.cancel()


def replicas_of(config: ShimConfig) -> deque[Replica]:
    """The replicas that the target names, in an order of this engine's own."""
    targets = config.target.split(",")
    return deque(Replica(config, target.strip()) for target in random.sample(targets, len(targets)))


def call_unary(replicas: deque[Replica], config: ShimConfig, method: str, request: Any, response_type: Any) -> Any:
    """One unary call, to one replica after the other while they are UNAVAILABLE, up to the budget.

    Raises the last grpc.RpcError. Not through the generated stubs: those of one grpcio release refuse to load under an
    older one.
    """
    end = time.monotonic() + config.budget_seconds
    while True:
        replicas.rotate()
        call = replicas[0].channel.unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            # The only replica is waited for; of several, the next one is as good.
            return call(
                request,
                timeout=max(_BACKOFF_SECONDS[0], end - time.monotonic()),
                wait_for_ready=len(replicas) == 1,
                metadata=_metadata(config),
            )
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() >= end:
                raise
        time.sleep(_BACKOFF_SECONDS[0])


def _open_channel(config: ShimConfig, target: str) -> grpc.Channel:
    """A Unix socket speaks plaintext."""
    if not config.tls_ca or target.startswith("unix:"):
        return grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
    files = [_read(config, name) for name in ("tls_ca", "tls_key", "tls_cert")]
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(*files), options=_CHANNEL_OPTIONS)


def _metadata(config: ShimConfig) -> tuple[tuple[str, str | bytes], ...]:
    """The tenant's token; the file is read at each call so that a rotated token takes effect."""
    token = _read(config, "token_file")
    return () if token is None else (("authorization", f"Bearer {token.decode(errors='replace').strip()}"),)


def _read(config: ShimConfig, name: str) -> bytes | None:
    """The file that the variable names; None where it names none."""
    path = getattr(config, name)
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise ConfigurationError(f"STEP_ORACLE_{name.upper()} {path}: {error.strerror}") from None
