"""What is refused at start, one sentence each: better no engine than one emulated wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_shim.errors import NotSupported

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raises NotSupported for the first feature of the configuration the shim does not emulate."""
    for unsupported, sentence in _rules(vllm_config):
        if unsupported:
            raise NotSupported(f"step-oracle does not emulate {sentence}")


def _rules(vllm_config: VllmConfig) -> list[tuple[Any, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    layer_types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    many = parallel.data_parallel_size > 1
    return [
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism yet; use --pipeline-parallel-size 1"),
        (many and model.is_moe, "data parallelism of MoE models yet (lock-step ranks); use --data-parallel-size 1"),
        (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "context parallelism yet; leave it off",
        ),
        (vllm_config.kv_transfer_config is not None, "KV connectors yet; leave --kv-transfer-config away"),
        (
            getattr(vllm_config, "ec_transfer_config", None) is not None,
            "encoder-cache connectors yet; leave --ec-transfer-config away",
        ),
        (
            speculative is not None and speculative.method != "ngram",
            f"speculative decoding by {getattr(speculative, 'method', None)!r} yet; only 'ngram' is",
        ),
        (model.runner_type != "generate", "pooling models yet; use a generative model"),
        (model.is_multimodal_model, "multimodal models yet (no encoder term); use a text model"),
        (model.is_encoder_decoder, "encoder-decoder models yet; use a decoder-only model"),
        (model.is_attention_free or model.is_hybrid, "state-space and hybrid models yet; use a full-attention model"),
        (
            model.get_sliding_window() is not None or layer_types - {"full_attention"},
            "sliding-window or mixed attention layers yet; use a full-attention model",
        ),
        (getattr(model, "is_diffusion", False), "diffusion language models yet"),
    ]
