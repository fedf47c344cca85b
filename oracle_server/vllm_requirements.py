"""Which of vLLM's requirements an environment without a GPU needs, and which of them it does not meet yet."""

from __future__ import annotations

import json
from dataclasses import dataclass

# Requirements of vLLM's wheels (0.18.1 to 0.33.0) that only a GPU's code path imports. torch is installed by its own
# stage; its companions are left out because their builds on the index are for CUDA; triton comes through xgrammar, is
# 1 GB, and without a driver is never used.
GPU_PACKAGES = (
    "apache-tvm-ffi",
    "cupy",
    "fastsafetensors",
    "flashinfer-cubin",
    "flashinfer-python",
    "humming-kernels",
    "instanttensor",
    "nvtx",
    "pynvvideocodec",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
    "torch",
    "torchaudio",
    "torchcodec",
    "torchvision",
    "triton",
    "xformers",
)
GPU_PREFIXES = ("nvidia-", "cuda-", "flashinfer-", "flash-attn", "cupy-cuda")
# A requirement with such an extra or name ending ("nvidia-cutlass-dsl[cu13]") is for one CUDA version.
GPU_EXTRA = r"cu\d\d+"
# 0.33.0 asks for a certifi of the week of its release, which an index that lags behind does not have; any will do.
RELAXED_PACKAGES = ("certifi",)

# Runs in the environment, so that markers are judged by its Python. pip's own copy of `packaging` is there before
# anything is installed. Prints the requirements of a METADATA file that apply, and those that are not met,
# dependencies included.
REQUIREMENTS_SCRIPT = """
import importlib.metadata, json, re, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

rules = json.load(sys.stdin)
seen, unmet = set(), []

def for_gpu(requirement):
    name = canonicalize_name(requirement.name)
    extras = [extra for extra in requirement.extras if re.fullmatch(rules["extra"], extra)]
    suffix = re.search("-" + rules["extra"] + "$", name)
    return name in rules["packages"] or name.startswith(tuple(rules["prefixes"])) or bool(extras) or bool(suffix)

def applies(requirement, extras):
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras})

def relaxed(requirement):
    if canonicalize_name(requirement.name) in rules["relaxed"]:
        requirement.specifier = requirement.specifier.__class__("")
    requirement.marker = None
    return requirement

def walk(requirement, top):
    key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
    try:
        found = importlib.metadata.distribution(requirement.name)
        version = found.metadata["Version"]
        met = version is not None and requirement.specifier.contains(version, prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        met = False
    if not met:
        unmet.append([str(requirement), str(top)])
    if not met or key in seen:
        return
    seen.add(key)
    for text in found.requires or []:
        child = Requirement(text)
        if applies(child, requirement.extras) and not for_gpu(child):
            walk(relaxed(child), top)

wanted, left_out = [], []
for text in rules["requirements"]:
    requirement = Requirement(text)
    if not applies(requirement, ()):
        continue
    if for_gpu(requirement):
        left_out.append(str(requirement))
        continue
    wanted.append(str(relaxed(requirement)))
    walk(requirement, requirement)
print(json.dumps({"wanted": wanted, "left_out": left_out, "unmet": unmet}))
"""


@dataclass(frozen=True)
class Verdict:
    """Requirements to install, those left out as GPU ones, and the unmet among the first, dependencies included."""

    wanted: tuple[str, ...]
    left_out: tuple[str, ...]
    unmet: tuple[str, ...]


def question(requirements: list[str]) -> str:
    """Standard input of REQUIREMENTS_SCRIPT about these Requires-Dist lines."""
    rules = {
        "requirements": requirements,
        "packages": GPU_PACKAGES,
        "prefixes": GPU_PREFIXES,
        "extra": GPU_EXTRA,
        "relaxed": RELAXED_PACKAGES,
    }
    return json.dumps(rules)


def verdict(output: str) -> Verdict:
    """What REQUIREMENTS_SCRIPT printed."""
    document = json.loads(output)
    unmet = tuple(dict.fromkeys(requirement for requirement, _ in document["unmet"]))
    return Verdict(wanted=tuple(document["wanted"]), left_out=tuple(document["left_out"]), unmet=unmet)


def recipe() -> list[object]:
    """Everything in this module that decides what is installed, as JSON values."""
    return [GPU_PACKAGES, GPU_PREFIXES, GPU_EXTRA, RELAXED_PACKAGES, REQUIREMENTS_SCRIPT]
