"""Profile packs: what a valid one is, writing, checking and compiling it, and comparing it with engines."""

from oracle_server.pack.check import Limits, PackReport, check_pack, compile_pack
from oracle_server.pack.cold import Difference, cold_differences
from oracle_server.pack.columns import COLUMNS, MODEL_FILE, OPERATORS_FILE, RESIDUALS_FILE, SAMPLES_FILE
from oracle_server.pack.durable import remove_partial_directories
from oracle_server.pack.facts import EngineFacts
from oracle_server.pack.kv_blocks import KvPlan, kv_blocks_basis, plan_kv_blocks
from oracle_server.pack.load import CompiledPack, load_compiled, open_oracle
from oracle_server.pack.manifest import (
    FILE_BYTES_LIMIT,
    MANIFEST_BYTES_LIMIT,
    MANIFEST_FILE,
    SCHEMA,
    ComposedLatency,
    Correction,
    Device,
    Engine,
    HybridLatency,
    HybridTerm,
    KvCache,
    Latency,
    Manifest,
    Model,
    Operator,
    PackFile,
    Parallel,
    SampledLatency,
    Uncertainty,
    canonical_manifest,
    digest_of,
    manifest_bytes,
    parse_manifest,
)
from oracle_server.pack.writer import write_pack
from oracle_server.sampling.grids import OPERATOR_AXES

__all__ = [
    "COLUMNS",
    "FILE_BYTES_LIMIT",
    "MANIFEST_BYTES_LIMIT",
    "MANIFEST_FILE",
    "MODEL_FILE",
    "OPERATORS_FILE",
    "OPERATOR_AXES",
    "RESIDUALS_FILE",
    "SAMPLES_FILE",
    "SCHEMA",
    "CompiledPack",
    "ComposedLatency",
    "Correction",
    "Device",
    "Difference",
    "Engine",
    "EngineFacts",
    "HybridLatency",
    "HybridTerm",
    "KvCache",
    "KvPlan",
    "Latency",
    "Limits",
    "Manifest",
    "Model",
    "Operator",
    "PackFile",
    "PackReport",
    "Parallel",
    "SampledLatency",
    "Uncertainty",
    "canonical_manifest",
    "check_pack",
    "cold_differences",
    "compile_pack",
    "digest_of",
    "load_compiled",
    "kv_blocks_basis",
    "manifest_bytes",
    "open_oracle",
    "parse_manifest",
    "plan_kv_blocks",
    "remove_partial_directories",
    "write_pack",
]
