"""What the closed loop's engines run on: this machine's CPU, a core for the model alone, or the device of a vLLM."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy.closed_loop.cores import MODEL_CORE, leave_core_to_the_model, on_other_cores
from deploy.closed_loop.workloads import SERVED_MODEL
from deploy.demo.progress import DemoFailed
from environments import VllmEnvironment, cpu_vllm_environment
from model_dir import CONFIGS, write_model_dir

# Small enough that a slow core serves a request or two a second; the vocabulary is the tokenizer's with room.
_SMALL: Mapping[str, object] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_OF_ALL = ("--served-model-name", SERVED_MODEL, "--no-enable-prefix-caching")
_OF_A_CPU = (
    # In 32 bits every CPU is fast; one without instructions for bfloat16 takes six times as long in 16.
    *(*_OF_ALL, "--enforce-eager", "--dtype", "float32"),
    *("--max-model-len", "2048", "--max-num-batched-tokens", "512", "--max-num-seqs", "32"),
)
# One engine is on the device, so its memory is shared as vLLM does it by itself.
_OF_A_DEVICE = (*_OF_ALL, "--max-model-len", "4096", "--max-num-batched-tokens", "2048", "--max-num-seqs", "64")
_VERSION = "import vllm; print(vllm.__version__)"


@dataclass(frozen=True)
class Machine:
    """One vLLM and what its engines are told; the same for the real and the emulated one but where said.

    `users`: so many at once keep an engine full.
    """

    vllm: VllmEnvironment
    serve: Sequence[str]
    users: int
    emulated_serve: Sequence[str] = ()
    real_variables: Mapping[str, str] = field(default_factory=dict)
    has_model_core: bool = False

    def beside_the_model(self) -> contextlib.AbstractContextManager[None]:
        """What is started in the block keeps off the model's core, where there is one."""
        return on_other_cores() if self.has_model_core else contextlib.nullcontext()

    def settle(self, pid: int) -> None:
        """An engine that has started leaves the model's core to the model."""
        if self.has_model_core:
            leave_core_to_the_model(pid)


def cpu_machine() -> Machine:
    """This machine's CPU: a cached vLLM for it, a KV cache of one GiB, and one core for the model."""
    return Machine(
        cpu_vllm_environment(),
        _OF_A_CPU,
        users=16,
        # What the CPU platform decides for itself.
        emulated_serve=("--no-async-scheduling",),
        real_variables={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(MODEL_CORE)},
        has_model_core=True,
    )


def device_machine(venv: Path, serve: Sequence[str]) -> Machine:
    """The vLLM of this virtual environment on the device it finds, told `serve` too. Raises DemoFailed without one."""
    python = venv / "bin" / "python"
    try:
        done = subprocess.run([str(python), "-c", _VERSION], capture_output=True, text=True, check=False)
    except OSError as error:
        raise DemoFailed(f"{python}: {error.strerror}", "give --vllm the folder of a virtual environment") from None
    if done.returncode:
        raise DemoFailed(
            f"{python} has no vLLM that can be imported: {done.stderr.strip()[-500:]}",
            "install vLLM there, or give --vllm another environment",
        )
    return Machine(
        VllmEnvironment(python.absolute(), done.stdout.split()[-1]),
        (*_OF_A_DEVICE, *serve),
        users=32,
        # The user's own, which processes of the loop do not get otherwise.
        real_variables={name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
    )


def small_model(folder: Path, **changes: object) -> Path:
    """A model for a CPU, with random weights."""
    return write_model_dir(folder, "qwen3-tiny", **{**_SMALL, **changes})


def model_of(folder: Path, shape: str) -> Path:
    """A model by the name of its published configuration, or a folder of the user's; weights are random."""
    if shape in CONFIGS:
        return write_model_dir(folder, shape)
    if (Path(shape) / "config.json").is_file():
        return Path(shape).absolute()
    raise DemoFailed(
        f"--model {shape}: neither a folder with a config.json nor one of {', '.join(CONFIGS)}",
        "give a model's folder: config.json and tokenizer are enough, weights are random",
    )
