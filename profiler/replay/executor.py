"""The shim's executor with a virtual clock and a local oracle; everything else is the shim's own code."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from oracle_server.errors import EngineMismatch
from oracle_server.pack.cold import cold_differences
from oracle_server.pack.facts import EngineFacts
from oracle_server.pack.kv_blocks import kv_blocks_basis, plan_kv_blocks
from oracle_server.pack.manifest import Manifest
from profiler.replay.clock import VirtualClock
from profiler.replay.local_oracle import LocalOracle
from profiler.replay.lock_step import Meet
from profiler.replay.times import RequestTimes
from step_oracle.v1 import oracle_service_pb2 as pb
from vllm_shim.executor import StepOracleExecutor
from vllm_shim.lease import Reply
from vllm_shim.step_shape import StepReader
from vllm_shim.stream import OracleStream
from vllm_shim.timeline import StepTimes

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_FACTS = tuple(item.name for item in dataclasses.fields(EngineFacts))


@dataclass(slots=True)
class ReplayContext:
    """What an executor and its driver share; one per engine."""

    manifest: Manifest
    engine_id: str
    allow_mismatch: tuple[str, ...] = ()
    # Ranks of the group this engine is one of; vLLM's own configuration says 1, see lock_step.py.
    data_parallel_size: int = 1
    clock: VirtualClock = field(default_factory=VirtualClock)
    times: dict[str, RequestTimes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class ReplayExecutor(StepOracleExecutor):
    """Executor of one engine of a replay; `context` is set by the subclass `for_engine` makes."""

    context: ReplayContext
    # Set where the engine is a rank of a lock-step group.
    _meet: Meet | None = None

    @classmethod
    def for_engine(cls, context: ReplayContext) -> type[ReplayExecutor]:
        """vLLM constructs its executor from a class and a configuration, so what belongs to the engine is the class."""
        return cast("type[ReplayExecutor]", type(cls.__name__, (cls,), {"context": context}))

    def _make_clock(self) -> VirtualClock:
        return self.context.clock

    def _attach(self) -> pb.AttachEngineResponse:
        """What the server would have answered: refused, warned of and sized by the same functions."""
        context = self.context
        self._engine.engine_id = context.engine_id
        self._engine_config.data_parallel_size = context.data_parallel_size
        facts = EngineFacts(
            **{name: getattr(self._engine_config, name) for name in _FACTS if name != "graph_capture_sizes"}
        )
        refused: list[str] = []
        for difference in cold_differences(context.manifest, facts):
            sentence = f"{difference.field} is {difference.engine_value} here, {difference.pack_value} in the pack"
            allowed = difference.field in context.allow_mismatch
            (refused if difference.severity == "refuse" and not allowed else context.warnings).append(sentence)
        if refused:
            raise EngineMismatch(
                f"engine and pack differ: {'; '.join(refused)}; change --engine-args or --model-config, or name the "
                "fields in --allow-mismatch",
                refused,
            )
        plan = plan_kv_blocks(context.manifest, facts)
        if plan.warning:
            context.warnings.append(plan.warning)
        self._kv_blocks_basis = kv_blocks_basis(plan)
        return pb.AttachEngineResponse(num_kv_blocks=plan.blocks, kv_blocks_basis=plan.basis)

    def _open_stream(self, opening: pb.StreamOpen) -> OracleStream:
        """The oracle is chosen by the run, see `begin_run`."""
        return cast("OracleStream", None)

    def join(self, meet: Meet) -> None:
        """From now on every pass is one of the group's."""
        self._meet = meet

    def begin_run(self, oracle: LocalOracle, trace_prefix: str) -> None:
        """Forget the run before."""
        self._begin()
        self._reader = StepReader(ids_are_keys=True)
        self._oracle = oracle
        self._stream = cast("OracleStream", oracle)
        # Latencies of the group's passes not yet settled; finishes of the last two passes.
        self._common_ns: deque[int] = deque()
        self._finish_ns: deque[int] = deque((0, 0), maxlen=2)
        self.end_run()
        if trace_prefix:
            Path(f"{trace_prefix}x").parent.mkdir(parents=True, exist_ok=True)
            # The same replay leaves the same file, whatever an earlier one left there.
            self._open_trace(trace_prefix, replace=True)

    def end_run(self) -> None:
        """Close the trace."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None

    @property
    def kv_blocks(self) -> int:
        return int(self._engine_config.num_kv_blocks)

    @property
    def facts(self) -> dict[str, Any]:
        """The engine's configuration, and how its KV blocks are known.

        Without the model's path, which is another one on another machine.
        """
        left_out = {"graph_capture_sizes", "model"}
        known = {name: getattr(self._engine_config, name) for name in _FACTS if name not in left_out}
        return {**known, "kv_blocks_basis": self._kv_blocks_basis}

    @property
    def next_step_index(self) -> int:
        return self._step_index + 1

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        now_ns, times = self.context.clock.now_ns(), self.context.times
        for new in scheduler_output.scheduled_new_reqs:
            request = times[new.req_id]
            if request.scheduled_ns < 0:
                request.scheduled_ns = now_ns
                request.prefix_hit_tokens = int(new.num_computed_tokens)
            else:
                # Model runner V2: a preempted request comes back as a new one.
                request.preemptions += 1
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            times[request_id].preemptions += 1
        answer = super().execute_model(scheduler_output, non_block)
        if self._meet is not None and scheduler_output.total_num_scheduled_tokens:
            _, handed_over, pending = self._dispatched
            assert pending.reply is not None  # noqa: S101  the oracle is in this process
            self._gather(handed_over, pending.reply.latency_ns[0])
        return answer

    def execute_dummy_batch(self) -> None:
        """A pass of one token for a rank that has none, while others of its wave work.

        Nobody waits for its result; as with asynchronous scheduling at most two passes are under way.
        """
        if self._meet is None:
            return
        self._step_index += 1
        self._clock.wait_until(self._finish_ns[0])
        latency_ns, prep_ns, copy_ns = self._oracle.dummy(self._step_index)
        times = self._gather(self._timeline.hand_over(self._clock.now_ns())[0], latency_ns)
        self._settle_together(times, prep_ns, copy_ns)

    def _gather(self, times: StepTimes, latency_ns: int) -> StepTimes:
        """The pass waits for those of the other ranks."""
        assert self._meet is not None  # noqa: S101  asked by callers
        times.dispatch_ns, common_ns = self._meet(times.dispatch_ns, latency_ns)
        self._common_ns.append(common_ns)
        self._clock.wait_until(times.dispatch_ns)
        return times

    def _settle(self, times: StepTimes, reply: Reply) -> None:
        """Once, in the order of dispatch: passes of a group last as long as the longest of them."""
        if self._meet is None:
            super()._settle(times, reply)
        elif not times.deadline_ns:
            self._settle_together(times, reply.prep_ns, reply.copy_ns)

    def _settle_together(self, times: StepTimes, prep_ns: int, copy_ns: int) -> None:
        self._timeline.settle(times, latency_ns=self._common_ns.popleft(), prep_ns=prep_ns, copy_ns=copy_ns)
        self._finish_ns.append(times.device_finish_ns)
