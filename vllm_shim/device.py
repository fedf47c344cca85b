"""The device vLLM is told it has: asked from the oracle once, in a short-lived process, handed on by environment.

No gRPC may live in a process that forks later (grpc/grpc #13873), and vLLM's front-end does. `python -m
vllm_shim.device`
asks and prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import NamedTuple

from vllm_shim.config import ShimConfig
from vllm_shim.errors import OracleLost, ShimError
from vllm_shim.exit_status import watch_for_loss

_VARIABLE = "STEP_ORACLE_DEVICE"


class Device(NamedTuple):
    """GetDeviceResponse as plain values; sizes in bytes, block_size in tokens, 0 and "" for unknown."""

    # Engine id of the vLLM server: worked out in the first process, where the command line is vLLM's own.
    engine_id: str
    name: str
    memory_bytes: int
    capability_major: int
    capability_minor: int
    generation: int
    block_size: int
    model_runner: str


@cache
def emulated_device() -> Device:
    """The device of this vLLM server; the first process asks, its children read the environment."""
    if not os.environ.get(_VARIABLE):
        config = ShimConfig.from_environment()
        finished = subprocess.run(
            [sys.executable, "-m", "vllm_shim.device"],
            env={**os.environ, "STEP_ORACLE_ENGINE_ID": config.engine_id},
            capture_output=True,
            text=True,
            check=False,
        )
        if finished.returncode:
            raise OracleLost((finished.stderr.strip().splitlines() or ["no message"])[-1])
        os.environ[_VARIABLE] = finished.stdout.strip()
        watch_for_loss()
    return Device(*json.loads(os.environ[_VARIABLE]))


def _ask() -> Device:
    import grpc

    from step_oracle.v1 import oracle_service_pb2 as pb
    from vllm_shim.stream import call_unary, replicas_of

    config = ShimConfig.from_environment()
    engine = pb.EngineIdentity(
        experiment=config.experiment, engine_id=config.engine_id, labels=dict(config.engine_labels)
    )
    try:
        answer = call_unary(
            replicas_of(config), config, "GetDevice", pb.GetDeviceRequest(engine=engine), pb.GetDeviceResponse
        )
    except grpc.RpcError as error:
        raise OracleLost(
            f"step-oracle: oracle {config.target} gave no device for {config.experiment} within the budget of "
            f"{config.budget_seconds:g} s: {error.code().name}: {error.details()}"
        ) from None
    device = answer.device
    return Device(
        config.engine_id,
        device.name,
        device.memory_bytes,
        device.capability_major,
        device.capability_minor,
        answer.generation,
        answer.block_size,
        answer.model_runner,
    )


if __name__ == "__main__":
    try:
        print(json.dumps(_ask()))
    except ShimError as shim_error:
        sys.exit(str(shim_error))
