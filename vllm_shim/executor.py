"""The Executor vLLM hands every step to. One process stands for all ranks; no worker and no model exist."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import grpc
from vllm.logger import init_logger
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput

from step_oracle.v1 import oracle_service_pb2 as pb
from step_oracle.v1 import step_pb2, trace_pb2
from vllm_shim.config import ShimConfig
from vllm_shim.device import emulated_device
from vllm_shim.engine_config import engine_config, engine_identity
from vllm_shim.errors import InjectedError, OracleLost
from vllm_shim.exit_status import report_loss
from vllm_shim.kv_cache import bytes_per_block, kv_cache_specs
from vllm_shim.lease import LeasedReply, Reply, message_of
from vllm_shim.output import OutputBuilder
from vllm_shim.run_summary import RunSummary
from vllm_shim.step_shape import DecodeStep, ScheduledStep, StepReader
from vllm_shim.stream import OracleStream, PendingStep, call_unary, replicas_of
from vllm_shim.timeline import Clock, DeadlineFuture, DeviceTimeline, StepTimes, resolved
from vllm_shim.tokens import TokenSource
from vllm_shim.trace import TraceWriter

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.step_oracle")

_PR_SET_TIMERSLACK = 29
_RESOLVED = resolved(None)
# Worker calls vLLM makes by itself that mean nothing without a worker; any other is logged once.
_CALLS_WITHOUT_EFFECT = (
    *("compile_or_warm_up_model", "set_kv_cache_layout", "update_max_model_len", "initialize_cache"),
    *("reset_mm_cache", "reset_encoder_cache"),
)


class StepOracleExecutor(Executor):
    """Asks the oracle how long each step takes and resolves it at that deadline.

    All methods run on the engine thread.
    """

    uses_ray = False
    supports_pp = False

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    @property
    def max_concurrent_batches(self) -> int:
        """Depth of the batch queue; read from the executor up to 0.20 and from the configuration later."""
        return 2 if self.scheduler_config.async_scheduling else 1

    def _init_executor(self) -> None:
        # 0.18.1 validates the configuration again once the executor exists and refuses async scheduling for an executor
        # it does not know by name; the class has been resolved by then, so a built-in name may stand there.
        if not hasattr(Executor, "supports_async_scheduling"):
            self.parallel_config.distributed_executor_backend = "uni" if self.parallel_config.world_size == 1 else "mp"
        self._config = ShimConfig.from_environment()
        self._clock = self._make_clock()
        self._specs = kv_cache_specs(self.vllm_config)
        self._block_bytes = bytes_per_block(self._specs)
        self._engine = engine_identity(self._config, emulated_device().engine_id, self.vllm_config)
        self._engine_config = engine_config(self.vllm_config, self._block_bytes // self.cache_config.block_size)
        self._attachment = self._attach()
        self._stream: OracleStream
        self._trace: TraceWriter | None = None
        self._tokens = TokenSource(self._tokenizer(), self.model_config.get_vocab_size())
        self._num_drafts = self._engine_config.num_speculative_tokens
        self._output = OutputBuilder(self._tokens, speculative=self._num_drafts > 0)
        # The step handed over last.
        self._dispatched: tuple[ScheduledStep | DecodeStep, StepTimes, PendingStep]
        self._loras: set[int] = set()
        self._silent_calls = set(_CALLS_WITHOUT_EFFECT)
        self._begin()

    def _begin(self) -> None:
        """The state of a device that has seen no step."""
        self._timeline = DeviceTimeline()
        self._reader = StepReader()
        self._step_index = -1
        # Device-busy time of the resolved steps.
        self._device_time_ns = 0
        self._summary = RunSummary()
        self._last_sampled: ScheduledStep | DecodeStep | None = None

    # What replay does otherwise: its clock is virtual and its oracle in the same process.

    def _make_clock(self) -> Clock:
        return Clock(self._config.wait)

    def _open_stream(self, opening: pb.StreamOpen) -> OracleStream:
        # Lateness of a 10 ms sleep: 85-98 us with the default timer slack of 50 us, 36-47 us with 1 ns (measured). This
        # is of the calling thread, the engine's.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        # A message passes three threads. At CPython's 5 ms its answer becomes visible only after the engine thread
        # blocks; at 0.02 ms they get in each other's way.
        return OracleStream(self._config, self._replicas, opening, hurried_seconds=0.0001)

    def _attach(self) -> pb.AttachEngineResponse:
        request = pb.AttachEngineRequest(
            engine=self._engine,
            config=self._engine_config,
            device_generation=emulated_device().generation,
            allow_mismatch=self._config.allow_mismatch,
        )
        self._replicas = replicas_of(self._config)
        try:
            answer: pb.AttachEngineResponse = call_unary(
                self._replicas, self._config, "AttachEngine", request, pb.AttachEngineResponse
            )
        except grpc.RpcError as error:
            loss = OracleLost(
                f"step-oracle: oracle {self._config.target} refused engine {self._engine.engine_id}: "
                f"{error.code().name}: {error.details()}"
            )
            report_loss(str(loss))
            raise loss from None
        differences = [
            f"{d.field} is {d.engine_value or 'unset'} here, {d.pack_value} in the pack" for d in answer.differences
        ]
        for sentence in (*answer.warnings, *differences):
            logger.warning("step-oracle: %s", sentence)
        blocks = (
            f"{answer.num_kv_blocks} KV blocks ({answer.kv_blocks_basis})" if answer.num_kv_blocks else "own KV blocks"
        )
        logger.info(
            "step-oracle: engine %s attached to %s at %s, incarnation %d, generation %d, pack %s, %s",
            *(self._engine.engine_id, self._engine.experiment, self._config.target, answer.incarnation),
            *(answer.generation, answer.pack_digest, blocks),
        )
        return answer

    def _tokenizer(self) -> Any | None:
        if self.model_config.skip_tokenizer_init:
            return None
        from vllm.tokenizers import cached_tokenizer_from_config

        return cached_tokenizer_from_config(self.model_config)

    # Control plane: every rank gives the same answer, no worker exists.

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        **_: Any,
    ) -> Any:
        """Answers by name, once per rank; None where there is nothing to say."""
        name = method if isinstance(method, str) else getattr(method, "__name__", "function")
        answer = getattr(self, f"_rpc_{name}", None)
        if answer is None and name not in self._silent_calls:
            self._silent_calls.add(name)
            logger.warning("step-oracle: worker call %s has no effect: there is no worker", name)
        value = answer(*args, **(kwargs or {})) if answer else None
        # vLLM reads compilation times, whose type changed twice, only out of a list that is not empty.
        values = [] if name == "compile_or_warm_up_model" else [value] * self.parallel_config.world_size
        return resolved(values) if non_block else values

    def get_kv_cache_specs(self) -> Any:
        return self._specs

    def determine_available_memory(self) -> list[int]:
        """The bytes of exactly the blocks this engine shall have: vLLM's own sizing and checks stay in charge."""
        config = self._engine_config
        blocks = config.num_gpu_blocks_override or self._attachment.num_kv_blocks
        own_bytes = 0 if config.num_gpu_blocks_override else config.kv_cache_memory_bytes
        return [own_bytes or blocks * self._block_bytes] * self.parallel_config.world_size

    def _rpc_get_supported_kv_cache_layouts(self) -> list[str]:
        from vllm.v1.kv_cache_interface import KVCacheLayout

        return [layout.name for layout in KVCacheLayout]

    def _rpc_initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """The KV cache exists: the engine is ready to step, so its stream opens."""
        self._engine_config.num_kv_blocks = kv_cache_configs[0].num_blocks
        opening = pb.StreamOpen(
            engine=self._engine,
            config=self._engine_config,
            incarnation=self._attachment.incarnation,
            allow_mismatch=self._config.allow_mismatch,
            # Drafts come with almost every step of a speculating engine, and no lease holds for them.
            leases=self._config.leases and not self._num_drafts,
        )
        self._stream = self._open_stream(opening)
        if self._config.trace:
            self._open_trace(self._config.trace)

    def _open_trace(self, prefix: str, *, replace: bool = False) -> None:
        self._trace = TraceWriter(
            prefix,
            trace_pb2.TraceHeader(
                engine=self._engine,
                config=self._engine_config,
                incarnation=self._attachment.incarnation,
                target=self._config.target,
                wait_mode=self._config.wait,
            ),
            replace=replace,
        )

    def _rpc_get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def _rpc_add_lora(self, lora_request: Any) -> bool:
        self._loras.add(lora_request.lora_int_id)
        return True

    def _rpc_remove_lora(self, lora_id: int) -> bool:
        self._loras.discard(lora_id)
        return True

    def _rpc_pin_lora(self, lora_id: int) -> bool:
        return lora_id in self._loras

    def _rpc_list_loras(self) -> set[int]:
        return set(self._loras)

    # Data plane.

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Takes the step's answer from a lease or asks the oracle; returns a resolved None.

        The Future of the step is the one of sample_tokens.
        """
        dispatch_ns = self._clock.now_ns()
        self._step_index += 1
        step = self._reader.read(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return resolved(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        times, idle_ns = self._timeline.hand_over(
            dispatch_ns, goes_on=bool(scheduler_output.scheduled_cached_reqs.req_ids)
        )
        if isinstance(step, DecodeStep) and self._config.leases and not idle_ns:
            pending = self._stream.submit_decode(self._step_index, step, self._request)
            if self._trace is not None:
                pending.request = pending.request or self._request(step)
        else:
            pending = self._stream.submit(self._request(step, idle_ns))
        self._dispatched = step, times, pending
        return _RESOLVED if non_block else None

    def _request(self, step: ScheduledStep | DecodeStep, idle_ns: int = 0) -> step_pb2.StepRequest:
        return step_pb2.StepRequest(
            step_index=self._step_index,
            shape=step.shape,
            device_time_ns=self._device_time_ns,
            device_idle_ns=idle_ns,
        )

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """The Future of the step handed over last."""
        scheduled, times, pending = self._dispatched
        legal = self._tokens.legal(grammar_output, scheduled) if grammar_output is not None else {}
        self._last_sampled = scheduled
        future = DeadlineFuture(self._is_due, self._resolve, times, pending, scheduled, legal)
        return future if non_block else future.result()

    def _is_due(self, times: StepTimes, pending: PendingStep, *_: Any) -> bool:
        """Whether waiting for the step would return at once.

        The steps before it have been settled: the queue is in order.
        """
        if pending.reply is None:
            return pending.error is not None
        self._settle(times, pending.reply)
        return self._clock.now_ns() >= times.deadline_ns

    def _resolve(
        self, times: StepTimes, pending: PendingStep, scheduled: ScheduledStep | DecodeStep, legal: dict[str, int]
    ) -> ModelRunnerOutput:
        try:
            reply = pending.reply or self._stream.wait(pending)
        except OracleLost as loss:
            _announce(loss)
            raise
        self._settle(times, reply)
        latency_ns = reply.latency_ns[0]
        leased = isinstance(reply, LeasedReply)
        self._device_time_ns += latency_ns
        # Made while the device is busy: what is made after the deadline makes every step of a waiting engine longer.
        output = None if reply.injected_error else self._output.build(scheduled, reply, legal)
        self._clock.wait_until(times.deadline_ns)
        resolved_ns, self._timeline.returned_ns = self._clock.now_ns(), times.deadline_ns
        lateness_ns, late_answer_ns = resolved_ns - times.deadline_ns, pending.answer_ns - times.deadline_ns
        self._stream.count_step(lateness_ns, late_answer_ns, reply)
        self._summary.count(latency_ns, reply.support, is_leased=leased, is_late=late_answer_ns > 0)
        if self._trace is not None:
            record = trace_pb2.TraceStep(
                request=pending.request,
                reply=message_of(reply),
                answer_ns=pending.answer_ns,
                resolved_ns=resolved_ns,
                leased=leased,
                **{name: getattr(times, name) for name in StepTimes.__slots__},
            )
            # Says how later steps may be answered, not how this one was.
            record.reply.ClearField("lease")
            self._trace.write(record)
        if output is None:
            error = InjectedError(
                f"step-oracle: injected error: step {reply.step_index} of engine {self._engine.engine_id} fails "
                f"because an overlay of {self._engine.experiment} says so (error_every_steps, generation "
                f"{reply.generation}); nothing real is wrong"
            )
            _announce(error)
            raise error
        return output

    def _settle(self, times: StepTimes, reply: Reply) -> None:
        """Once for each step, in the order of dispatch."""
        if not times.deadline_ns:
            self._timeline.settle(
                times,
                latency_ns=reply.latency_ns[0],
                prep_ns=reply.prep_ns,
                copy_ns=reply.copy_ns,
                host_ns=reply.host_ns,
            )

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts for the step after the one sampled last.

        Fillers, as many as allowed; how many hold is the oracle's answer.
        """
        step = self._last_sampled
        if not self._num_drafts or step is None:
            return None
        states = [request.state for request in step.requests if request.output_index >= 0]
        drafts = [
            [self._tokens.filler(state, state.emitted_tokens + i) for i in range(self._num_drafts)] for state in states
        ]
        return DraftTokenIds([state.request_id for state in states], drafts)

    def execute_dummy_batch(self) -> None:
        """Only lock-step ranks of MoE models run dummy batches, and those are refused at start."""

    def check_health(self) -> None:
        """An engine that has lost its oracle ends by itself."""

    def shutdown(self) -> None:
        # First: closing the stream takes time, and the line was lost when it came behind (0.33.0, seen).
        if (summary := getattr(self, "_summary", None)) and summary.steps:
            logger.info("step-oracle: engine %s ends after %s", self._engine.engine_id, summary)
            self._summary = RunSummary()
        if stream := getattr(self, "_stream", None):
            stream.close()
        if trace := getattr(self, "_trace", None):
            trace.close()


def _announce(error: Exception) -> None:
    """What ends the engine, in its log and as the last words of the server."""
    logger.critical("%s", error)
    report_loss(str(error))
