"""The one place that touches aiconfigurator-core: a model's operators, evaluated one by one, offline.

Only the facade its authors keep stable is used (EngineHandle and its evaluate_*_ops), with one marked exception for
transferred tables. Verified against 0.12.0, the version the `synthesize` extra pins.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle_server.errors import FailedPrecondition, InvalidArgument

BACKEND = "vllm"

# Operators by the part of a step they belong to. Names, not indices: those differ between the two lists and between
# models. A name that is not here is refused, since nobody would know what its cost depends on.
GEMM = ("qkv_gemm", "proj_gemm", "gate_ffn1_gemm", "ffn2_gemm", "router_gemm", "moe")
ELEMENTWISE = ("embedding", "add_norm_1", "add_norm_2", "act_gate")
ALL_REDUCE = ("embedding_ar", "ar_1", "ar_2", "p2p", "moe_pre_dispatch", "moe_post_dispatch")
LOGITS = "logits_gemm"
ATTENTION = "attention"


@dataclass(frozen=True)
class System:
    """One accelerator as the installed library describes it."""

    name: str
    # The literal version of its vLLM tables.
    table_version: str
    # As torch.cuda.get_device_name said where the tables were measured.
    device_name: str
    memory_bytes: int
    capability: tuple[int, int]
    intra_node_bytes_per_s: float
    data_directory: Path

    @property
    def has_nvlink(self) -> bool:
        """PCIe 5.0 x16 ends at 64 GB/s per direction; every NVLink system lies far above."""
        return self.intra_node_bytes_per_s > 64e9


def library_root() -> Path:
    """Where aiconfigurator-core is installed; found without importing it."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        raise FailedPrecondition(
            "synthesize needs aiconfigurator-core, which is not installed: pip install 'step-oracle[synthesize]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def library_version() -> str:
    return importlib.metadata.version("aiconfigurator-core")


def read_system(name: str) -> System:
    """Reads the library's description of `name`; InvalidArgument lists the systems that have vLLM tables."""
    import pyarrow.parquet as pq
    import yaml  # type: ignore[import-untyped]  # a dependency of aiconfigurator-core

    root = library_root() / "systems"
    known = sorted(path.parts[-4] for path in root.glob(f"data/*/gemm/{BACKEND}/*"))
    if name not in known:
        raise InvalidArgument(
            f"system {name!r} has no vLLM tables in aiconfigurator-core {library_version()}; those that have: "
            f"{', '.join(dict.fromkeys(known))}",
            field="system",
        )
    versions = yaml.safe_load((root / "query_versions.yaml").read_text(encoding="utf-8"))
    slot = versions.get("overrides", {}).get(name, {}).get(BACKEND) or versions["defaults"][BACKEND]
    described = yaml.safe_load((root / f"{name}.yaml").read_text(encoding="utf-8"))
    gpu, node = described["gpu"], described["node"]
    data = root / str(described["data_dir"])
    version = str(slot["current"])
    gemm = pq.ParquetFile(data / "gemm" / BACKEND / version / "gemm_perf.parquet")
    device_name = str(next(gemm.iter_batches(batch_size=1, columns=["device"])).column(0)[0].as_py())
    capability = int(gpu.get("sm_version") or 0)
    return System(
        name=name,
        table_version=version,
        device_name=device_name,
        memory_bytes=int(gpu["mem_capacity"]),
        capability=(capability // 10, capability % 10),
        intra_node_bytes_per_s=float(node["intra_node_bw"]),
        data_directory=data,
    )


def table_digests(paths: Iterable[Path]) -> dict[str, str]:
    """sha256 of the tables the labels were read from, keyed by their path inside the library."""
    root = library_root()
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(set(paths))
    }


class OperatorModel:
    """The compiled operators of one model on one system; owned by one thread (the handle keeps per-call state).

    All latencies are nanoseconds per step, summed over layers, of one tensor-parallel rank.
    """

    def __init__(
        self,
        model_directory: Path,
        system: System,
        tensor_parallel: int,
        *,
        transferred: bool,
        kv_cache_dtype: str = "auto",
    ) -> None:
        # A bare local directory is read without any network access; these stop the hub's client should it be reached.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
        library_root()
        logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
        self._allows_transferred = transferred
        self._transferred: set[str] = set()
        try:
            self._engine = _compile(model_directory, system, tensor_parallel, transferred, kv_cache_dtype)
        except Exception as error:  # the library raises its own, ValueError and RuntimeError alike
            raise InvalidArgument(
                f"aiconfigurator-core cannot build {model_directory} on {system.name} with tensor parallel "
                f"{tensor_parallel}: {error}",
                field="model",
            ) from error
        self._context = self._names(self._engine.evaluate_context_ops, "context_")
        self._generation = self._names(self._engine.evaluate_generation_ops, "generation_")

    def dense(self, names: Sequence[str], tokens: int) -> float:
        """Operators whose cost follows the step's total tokens."""
        indices = [self._context[name] for name in names if name in self._context]
        if not indices:
            return 0.0
        return self._sum(self._engine.evaluate_context_ops(indices, batch_size=1, s=tokens, prefix=0, x=tokens))

    def logits(self, rows: int) -> float:
        return self._sum(self._engine.evaluate_generation_ops([self._generation[LOGITS]], batch_size=rows, s=1))

    def generation_attention(self, requests: int, context: int) -> float:
        """Decode attention of `requests` requests that read `context` KV tokens each, the new one included."""
        index = self._generation[ATTENTION]
        return self._sum(self._engine.evaluate_generation_ops([index], batch_size=requests, s=context))

    def context_attention(self, chunk: int, history: int) -> float:
        """Prefill attention of one request: `chunk` new tokens over `history` KV tokens it has already."""
        index = self._context[ATTENTION]
        return self._sum(self._engine.evaluate_context_ops([index], batch_size=1, s=chunk, prefix=history))

    def take_transferred(self) -> frozenset[str]:
        """Operators that were answered from another device's or shape's table since the last call."""
        taken, self._transferred = frozenset(self._transferred), set()
        return taken

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._context)

    def _sum(self, values: list[tuple[str, float, float, str]]) -> float:
        tier = self._engine.last_provenance()
        if tier is not None:
            self._transferred.update(f"{value[0]} ({tier})" for value in values if value[3] != "silicon")
        return 1e6 * sum(value[1] for value in values)

    def _names(self, evaluate: Any, prefix: str) -> dict[str, int]:
        known = {*GEMM, *ELEMENTWISE, *ALL_REDUCE, LOGITS, ATTENTION}
        names: dict[str, int] = {}
        for index in range(_MAX_OPERATORS):
            try:
                values = evaluate([index], batch_size=1, s=16)
            except Exception as error:
                if "out of range" in str(error):
                    break
                hint = "" if self._allows_transferred else "; --allow-transferred takes it from elsewhere"
                raise InvalidArgument(
                    f"aiconfigurator-core has no table for an operator of this model: {error}{hint}", field="model"
                ) from error
            name = values[0][0].removeprefix(prefix)
            if name not in known:
                raise InvalidArgument(
                    f"operator {values[0][0]!r} of this model has a cost we do not know how to compose; dense and "
                    "mixture-of-experts models with plain attention are supported",
                    field="model",
                )
            if name in names:
                raise InvalidArgument(
                    f"this model has two operators named {values[0][0]!r} (sliding windows); only one kind of "
                    "attention is supported",
                    field="model",
                )
            names[name] = index
        return names


_MAX_OPERATORS = 64


def _attention_modes(kv_cache_dtype: str) -> dict[str, str]:
    """kv_cache_dtype auto of vLLM: 16-bit keys, values and attention, also under an fp8 checkpoint.

    There the library would assume fp8. Its tables of 8-bit keys and values are of 16-bit queries.
    """
    return {"kvcache_quant_mode": "fp8" if kv_cache_dtype == "fp8" else "bfloat16", "fmha_quant_mode": "bfloat16"}


def _compile(
    model_directory: Path, system: System, tensor_parallel: int, transferred: bool, kv_cache_dtype: str
) -> Any:
    from aiconfigurator_core.sdk import EngineHandle  # type: ignore[import-not-found,unused-ignore]

    modes = _attention_modes(kv_cache_dtype)
    if not transferred:
        return EngineHandle.compile(
            str(model_directory),
            system.name,
            BACKEND,
            backend_version=system.table_version,
            tp_size=tensor_parallel,
            moe_tp_size=tensor_parallel,
            **modes,
        )
    # Outside the stable facade: the mode of the tables is a property of the database view, which `compile` hides.
    from aiconfigurator_core.sdk import config_builders, engine, models, perf_database

    config = config_builders.build_model_config(
        tp_size=tensor_parallel,
        pp_size=1,
        attention_dp_size=1,
        moe_tp_size=tensor_parallel,
        moe_ep_size=1,
        kvcache_quant_mode=modes["kvcache_quant_mode"],
        fmha_quant_mode=modes["fmha_quant_mode"],
    )
    config_builders.apply_nextn(config, 0)
    model = models.get_model(str(model_directory), config, BACKEND)
    view = perf_database.get_database_view(system.name, BACKEND, system.table_version, database_mode="HYBRID")
    spec = engine.build_engine_spec_json(
        model,
        model_path=str(model_directory),
        system=system.name,
        backend=BACKEND,
        backend_version=system.table_version,
        kv_block_size=None,
        systems_path=None,
        nextn=0,
        database=view,
    )
    import aiconfigurator_core

    return EngineHandle(bytes(aiconfigurator_core.engine_spec_bincode_from_json(spec)))
