"""vLLM's view of the emulated device. Installs our executor; everything else is an answer to a question vLLM asks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from vllm_shim.device import emulated_device
from vllm_shim.engine_config import DATA_PARALLEL
from vllm_shim.supported import refuse_unsupported

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_DEVICE = emulated_device()
if _DEVICE.model_runner and not os.environ.get("VLLM_USE_V2_MODEL_RUNNER"):
    # Decides how the scheduler treats preempted requests and drafts; a host without a driver falls back to V1 by
    # itself.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if _DEVICE.model_runner == "v2" else "0"


class StepOraclePlatform(Platform):
    """An out-of-tree platform whose device is the profile pack's."""

    _enum = PlatformEnum.OOT
    device_name = "step-oracle"
    device_type = "cpu"
    dispatch_key = "CPU"
    dist_backend = "gloo"
    device_control_env_var = "EMULATED_VISIBLE_DEVICES"
    simple_compile_backend = "eager"

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return _DEVICE.name

    @classmethod
    def get_device_uuid(cls, device_id: int = 0) -> str:
        return f"step-oracle-{device_id}"

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        return _DEVICE.memory_bytes

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        if not _DEVICE.capability_major:
            return None
        return DeviceCapability(_DEVICE.capability_major, _DEVICE.capability_minor)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Called in every process, and again when vLLM validates the configuration anew: idempotent."""
        if vllm_config.model_config is None:
            return
        refuse_unsupported(vllm_config)
        if vllm_config.parallel_config.data_parallel_size > 1:
            # Engine cores of dense models are told 1 (0.18.1 to 0.33.0, read), but their ids need the rank.
            os.environ[DATA_PARALLEL] = str(vllm_config.parallel_config.data_parallel_size)
        vllm_config.parallel_config.distributed_executor_backend = "vllm_shim.executor.StepOracleExecutor"
        cache = vllm_config.cache_config
        if _DEVICE.block_size and not getattr(cache, "user_specified_block_size", False):
            cache.block_size = _DEVICE.block_size
        elif cache.block_size is None:
            cache.block_size = 16
        from vllm.config import CompilationMode, CUDAGraphMode

        # Nothing is compiled or captured: there is no model.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE

    # The same for every device.
    inference_mode = staticmethod(torch.no_grad)
    support_hybrid_kv_cache = staticmethod(lambda: True)
    get_attn_backend_cls = staticmethod(lambda *_, **__: "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend")
    get_punica_wrapper = staticmethod(lambda: "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU")
    # vLLM would load kernels, pick attention backends or touch a device here.
    import_kernels = import_ir_kernels = staticmethod(lambda: None)
    update_block_size_for_backend = set_device = manual_seed_all = staticmethod(lambda _: None)
    is_pin_memory_available = support_static_graph_mode = use_custom_allreduce = staticmethod(lambda: False)
