"""Checks of the shim's configuration and of the oracle server it names.

The shim's own code reads the variables and states a model's shape, each in a short-lived process: what passes here
passes in an engine. grpc is used where it is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oracle_server.config import DEFAULT_TARGET, read_config
from oracle_server.doctor_install import Host
from oracle_server.errors import InvalidArgument
from oracle_server.finding import Finding, ok, problem, warning

SERVICE = "step_oracle.v1.OracleService"

# Reads the variables as an engine does; argv is that of `vllm serve`, whose port names the engine by default.
_CONFIGURATION = """
import json, sys
from dataclasses import asdict
from vllm_shim.config import ShimConfig
from vllm_shim.errors import ShimError
try:
    config = ShimConfig.from_environment(argv=["vllm", "serve"])
except ShimError as error:
    sys.exit(str(error))
print(json.dumps(asdict(config), default=dict))
"""
# The shape of a model folder as the shim states it at attach.
_MODEL_SHAPE = """
import json, sys
from types import SimpleNamespace
from vllm_shim.engine_config import model_shape
config = json.load(open(sys.argv[1], encoding="utf-8"))
text = SimpleNamespace(**{**config, **config.get("text_config", {})})
print(model_shape(SimpleNamespace(hf_config=SimpleNamespace(**config), hf_text_config=text)))
"""

# (method, request bytes) -> response bytes; raises CallFailed.
Call = Callable[[str, bytes], bytes]


class CallFailed(Exception):
    """A call that did not succeed: the name of the gRPC status and its message."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details


def examine(host: Host, model: Path | None, timeout_seconds: float) -> Iterator[Finding]:
    """The variables first, then the server as far as it can be reached."""
    yield from model_folder(model, host.environ)
    if not host.is_engine_host:
        yield server_variables(host.environ)
        yield ok("STEP_ORACLE_TARGET", f"is not set: vLLM here runs as it is (to emulate: {DEFAULT_TARGET})")
        return
    config, finding = shim_variables(host.environ)
    yield finding
    if config is None:
        return
    serving: list[Call] = []
    for target in map(str.strip, str(config["target"]).split(",")):
        try:
            call = _channel_call({**config, "target": target}, timeout_seconds)
        except ImportError:
            # The finding on grpcio says what to do.
            return
        except OSError as error:
            mend = "correct STEP_ORACLE_TLS_CA, _CERT and _KEY; an engine refuses to start with them"
            yield problem("tls", str(error), mend)
            return
        reachable = health(call, target)
        yield reachable
        if reachable.status == "ok":
            serving.append(call)
    if serving:
        # Any replica answers alike.
        yield from experiment(config, serving[0], model)


def server_variables(environ: Mapping[str, str]) -> Finding:
    """The server's reading of its variables; it knows the names of the shim's."""
    try:
        read_config(environ)
    except InvalidArgument as error:
        return problem("variables", error.message, "correct or unset the variable; the server refuses to start with it")
    return ok("variables", _given(environ))


def shim_variables(environ: Mapping[str, str]) -> tuple[dict[str, Any] | None, Finding]:
    """The shim's reading of its variables, field by field, or None where it refuses them."""
    done = _python(["-c", _CONFIGURATION], environ)
    if done.returncode != 0:
        message = (done.stderr.strip().splitlines() or ["the shim's configuration could not be read"])[-1]
        return None, problem("variables", message, "correct or unset the variable; an engine refuses to start with it")
    config: dict[str, Any] = json.loads(done.stdout)
    return config, ok("variables", _given(environ))


def model_folder(model: Path | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What vLLM needs of a model when it may not, or need not, ask the hub."""
    offline = environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if model is None:
        told = "is set: give vLLM a model folder or a cached name" if offline else "is not set: vLLM may ask the hub"
        yield ok("HF_HUB_OFFLINE", told)
        return
    files = ("config.json", "tokenizer_config.json")
    missing = [name for name in files if not (model / name).is_file()]
    if missing:
        mend = "give a folder with the model's config and tokenizer; weights are not needed (--load-format dummy)"
        yield problem("model", f"{model} has no {' and no '.join(missing)}", mend)
        return
    weights = any(model.glob("*.safetensors")) or any(model.glob("*.bin"))
    yield ok("model", f"{model} {'has weights, which are not read' if weights else 'needs --load-format dummy'}")
    if not offline:
        yield ok("HF_HUB_OFFLINE", "is not set; with a model folder, HF_HUB_OFFLINE=1 keeps vLLM from asking the hub")


def health(call: Call, target: str) -> Finding:
    """The standard health check, spoken without its generated code, which the core does not have."""
    request = b"\x0a" + bytes([len(SERVICE)]) + SERVICE.encode()
    try:
        response = call("/grpc.health.v1.Health/Check", request)
    except CallFailed as failure:
        if failure.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            mend = "start it (step-oracle serve), or correct STEP_ORACLE_TARGET"
            return problem("oracle", f"nothing answers at {target}: {failure.details}", mend)
        mend = "correct STEP_ORACLE_TARGET: another service answers there"
        return problem("oracle", f"{target} is no oracle server: {failure.code} {failure.details}", mend)
    # HealthCheckResponse.status is field 1, a varint; 1 is SERVING.
    if response == b"\x08\x01":
        return ok("oracle", f"{target} is serving")
    return problem("oracle", f"{target} is up but not ready", "wait until it is; its log says what it is doing")


def experiment(config: Mapping[str, Any], call: Call, model: Path | None) -> Iterator[Finding]:
    """The experiment's answer to an engine of this configuration."""
    from step_oracle.v1 import oracle_service_pb2 as pb

    name, own_id = str(config["experiment"]), str(config["engine_id"])
    identity = pb.EngineIdentity(experiment=name, engine_id=own_id, labels=config["engine_labels"])
    request = pb.GetDeviceRequest(engine=identity).SerializeToString()
    try:
        response = pb.GetDeviceResponse.FromString(call(f"/{SERVICE}/GetDevice", request))
    except CallFailed as failure:
        mend = "step-oracle experiment list shows them; create one, or set STEP_ORACLE_EXPERIMENT or _ENGINE_LABELS"
        yield problem("experiment", f"{name} gives this engine no device: {failure}", mend)
        return
    yield ok("experiment", f"{name}, generation {response.generation}")
    memory = response.device.memory_bytes / 2**30
    yield ok("device", f"{response.device.name}, {memory:.0f} GiB, pack {response.pack_digest[:19]}")
    try:
        yield engine_id(own_id, name, call)
        if model is not None and (model / "config.json").is_file():
            yield pack_shape(model, name, response.pack_digest, call)
    except CallFailed as failure:
        yield warning("control plane", str(failure), "see the server's log")


def engine_id(own: str, experiment_name: str, call: Call) -> Finding:
    """Whether a live engine has the id that an engine started here would present."""
    from step_oracle.v1 import experiment_pb2 as pb

    request = pb.ListEnginesRequest(parent=experiment_name)
    response = call("/step_oracle.v1.ExperimentService/ListEngines", request.SerializeToString())
    engines = [engine.engine_id for engine in pb.ListEnginesResponse.FromString(response).engines]
    if any(other == own or other.startswith(f"{own}/dp") for other in engines):
        mend = "if that is not the engine you mean, give each vLLM server its own STEP_ORACLE_ENGINE_ID"
        return warning("engine id", f"{own} is attached now", mend)
    return ok("engine id", f"{own} is free ({len(engines)} engines are attached)")


def pack_shape(model: Path, experiment_name: str, digest: str, call: Call) -> Finding:
    """Whether the model folder has the shape the pack was taken with."""
    from step_oracle.v1 import pack_pb2 as pb

    tenant = "/".join(experiment_name.split("/")[:2])
    request = pb.GetPackRequest(name=f"{tenant}/packs/{digest}")
    response = call("/step_oracle.v1.ProfilePackService/GetPack", request.SerializeToString())
    manifest = json.loads(pb.GetPackResponse.FromString(response).pack.manifest_json)
    of_pack = str(manifest["model"].get("shape", ""))
    done = _python(["-c", _MODEL_SHAPE, str(model / "config.json")], {})
    if done.returncode != 0:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return problem(
            "pack", f"{model}/config.json could not be read: {message}", "give a model folder of vLLM's form"
        )
    of_model = done.stdout.strip()
    if of_pack and of_pack != of_model:
        mend = "serve the model the pack is for, or bind another pack to this engine (step-oracle experiment activate)"
        return problem("pack", f"the model's shape is {of_model!r}, the pack's {of_pack!r}", mend)
    return ok("pack", f"fits the model: {of_model}" if of_pack else "states no model shape")


def _given(environ: Mapping[str, str]) -> str:
    return ", ".join(sorted(name for name in environ if name.startswith("STEP_ORACLE_"))) or "none of ours is set"


def _channel_call(config: Mapping[str, Any], timeout_seconds: float) -> Call:
    import grpc

    names = [config.get(name) for name in ("tls_ca", "tls_key", "tls_cert")]
    if names[0] and not str(config["target"]).startswith("unix:"):
        credentials = grpc.ssl_channel_credentials(*(Path(name).read_bytes() if name else None for name in names))
        channel = grpc.secure_channel(str(config["target"]), credentials)
    else:
        channel = grpc.insecure_channel(str(config["target"]))
    token = config.get("token_file")
    secret = Path(token).read_text(encoding="utf-8").strip() if token and Path(token).is_file() else ""
    metadata = (("authorization", f"Bearer {secret}"),) if secret else ()

    def call(method: str, request: bytes) -> bytes:
        try:
            unary = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
            response: bytes = unary(request, timeout=timeout_seconds, metadata=metadata)
        except grpc.RpcError as error:
            raise CallFailed(error.code().name, error.details() or "") from None
        return response

    return call


def _python(arguments: list[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs our own code in a process of its own, on this process's import paths."""
    environment = {**variables, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
