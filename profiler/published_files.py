"""The measurements of other people that tests and `make accuracy` read: which files, from where, with which bytes."""

from __future__ import annotations

from typing import Final, NamedTuple


class Source(NamedTuple):
    """A public GitHub repository; commit "": no commit is recorded. The licence is that of the data (SPDX)."""

    repository: str
    commit: str
    licence: str


class PublishedFile(NamedTuple):
    """One file of the data folder, by its path in it. Some are excerpts of what their source publishes."""

    path: str
    size_bytes: int
    sha256: str
    source: Source


_BLIS: Final = Source("inference-sim/inference-sim", "9293b22", "Apache-2.0")
_ROCM: Final = Source("ROCm/rocm-aic", "c379040", "MIT")
_SERVING_SIM: Final = Source("casys-kaist/LLMServingSim", "5daddb2", "MIT")
_AZURE: Final = Source("Azure/AzurePublicDataset", "", "CC-BY-4.0")
_MOONCAKE: Final = Source("kvcache-ai/Mooncake", "", "Apache-2.0")
_SERVEGEN: Final = Source("alibaba/ServeGen", "", "Apache-2.0")
_VIDUR: Final = Source("microsoft/vidur", "", "MIT")

PUBLISHED_FILES: Final = (
    PublishedFile(
        "blis_steps/codellama-34b-tp2-general.parquet",
        245052,
        "28d9f2c5c9a1f447e2a8b633c869f11c21486b304ba2490b61ba636bc9fdf579",
        _BLIS,
    ),
    PublishedFile(
        "blis_steps/llama-2-70b-hf-tp4-codegen.parquet",
        212491,
        "afb9bc993d19402271e93e75fb00de5ef0972f1b2d9bd7320f5797fae7368632",
        _BLIS,
    ),
    PublishedFile(
        "llm_emu_packs/LICENSE.md",
        1085,
        "3de7fea911353980067e0f943d332dd74cbd2b610d4421318aaef25d8103f11d",
        _ROCM,
    ),
    PublishedFile(
        "llm_emu_packs/MI300X-Qwen3-8B.capture.txt",
        1073,
        "471a096a13561a977e851145c7482ea7e186ea9707425a61cec82b07213c6089",
        _ROCM,
    ),
    PublishedFile(
        "llm_emu_packs/MI300X-Qwen3-8B.json",
        1046752,
        "f692deacf6d10ad4fae115a51e4a6fa92656eaf2cd73dcc6c293ee638a211df2",
        _ROCM,
    ),
    PublishedFile(
        "llmservingsim/LICENSE",
        1076,
        "d74d0ee1a35975f6bd570bdcffbc5bf99fc3e808850da80b8aad8ab7308696f0",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/Llama-3.1-8B.config.json",
        826,
        "54acfad3cffe057640904ca8a1e83525e6551c70c7a04c641f5a9eda0bbf64bd",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/operators/attention.csv",
        204129,
        "60f0669b5e85467b18d0ca241a826c4376c530b22b74b7b20748a1955cf61949",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/operators/dense.csv",
        31680,
        "4f5b0623f1fa27033752cc54807a4089c39205c7132a0bb196520249d9d9140a",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/operators/meta.yaml",
        1063,
        "9c99dc484f44f965e7cdb95767706973588b1462a20332ee6430767433732deb",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/operators/per_sequence.csv",
        1609,
        "acbc8294d6749cb3ed8eaccb9ab561e62cacf9fbc06e6901c89646d750d94647",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/operators/skew.csv",
        1002235,
        "d7ee78f69aba661ad3f69ee5ebbc589e68f35690fb15e17d8cd84e5ac6fd29a0",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/operators/skew_fit.csv",
        169561,
        "ac3391e1b764ed61b7e4c479c74bd35b0c949066c0b08ecc5f5fba75a9dc3b87",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/run/llmservingsim_summary.txt",
        1022,
        "80c1b498f741d798e705fc83dfe79394cabee41eb18cfba6957ae17f01062f25",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/run/meta.json",
        11764,
        "56cbcb2a08e9fe6f67d60cad8ee545f86c874f82b46ab413da484f331417b2fc",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/run/requests.jsonl",
        70259,
        "5a6f2a0b09d5eb84bd75b30ed625d883c22b4bcc0a839cd1128ae42f74ecc90d",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/run/simulator_config.json",
        786,
        "cb99198f062defb7ca947a3d8e81f273352637562c66eb75dc26e7e5ef3e2f8e",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTX4090-Llama-3.1-8B-tp1/run/timeseries.csv",
        5656,
        "f99d474f8d8a2c52f986fb27e46832a1627fc908d7570852b016573b89ab3173",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/operators/attention.csv",
        469632,
        "dd802390245b2c215a491b78c390482fbc6e49afc760182d7ce15fddff369175",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/operators/dense.csv",
        31587,
        "6f23be95325a16544319b78c477d71bec8996fdc826ae55140c36f36e17973c4",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/operators/meta.yaml",
        2329,
        "01c964ad3e8ce9604773e7c0b3ae815c22545385d789842a920d8f33b1ce8b98",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/operators/per_sequence.csv",
        1606,
        "af9abb35ef5eb7c98e1856fa5fe5090008d8b98f1b6278b6d081577451d9c618",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/operators/skew.csv",
        990369,
        "7cf6ec2e063655b6ab4079c928849d0ec9a9559bab0b643c98584196cca471a2",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/operators/skew_fit.csv",
        169491,
        "89e8f8ffba2f8968485cd11d0ac9fd50b5b2bf2593bd73e326b81a2e5958c8c3",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/run/llmservingsim_summary.txt",
        1022,
        "40dbb4ac3fa2c1c1e0f65891b914de2af245192ef04e9ca25a74a3c5132a13c5",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/run/meta.json",
        708,
        "c074b29bddabe66102e3e635dd7910c35927c3f52b73d58d8fa0798f38156ae4",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/run/requests.jsonl",
        71451,
        "0175b31b0ddc02b97eb6da1410dc80fc5900b8785c988e90cacee1021d644682",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/run/simulator_config.json",
        787,
        "26c8b385dbb295de3653bac521fd42b99de03736b747f5d2f1cdf2e0c8abeae8",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/RTXPRO6000-Llama-3.1-8B-tp1/run/timeseries.csv",
        2003,
        "de884551204aeb9c12d8bed0fa78a5eb6b85e1e0bb173e9664fd6e5f26998aed",
        _SERVING_SIM,
    ),
    PublishedFile(
        "llmservingsim/sharegpt-llama-3.1-8b-300-sps10.jsonl",
        2574379,
        "05e48b32da530d4a3dd77f3d47c6fe694ac8308d611aa088e38bb10fba2b3b3a",
        _SERVING_SIM,
    ),
    PublishedFile(
        "workloads/arxiv_summ_lengths.npz",
        110265,
        "ab80b57c757c541076f72c8a1abb4800cf130fb2acba3524db61bfca347f6580",
        _VIDUR,
    ),
    PublishedFile(
        "workloads/azure2023_code.csv",
        320117,
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        _AZURE,
    ),
    PublishedFile(
        "workloads/azure2023_conv.csv",
        719188,
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        _AZURE,
    ),
    PublishedFile(
        "workloads/mooncake_conversation_lengths.csv",
        233744,
        "e0f9e653ec0de9a7618980de0dc589baac61a53901fca188cf1ebceac9e41add",
        _MOONCAKE,
    ),
    PublishedFile(
        "workloads/mooncake_synthetic_first1500.jsonl",
        348103,
        "863d0f826696bc61fd135b17b2e36f16704358ab748ebe01fed5c8b2883fc8ac",
        _MOONCAKE,
    ),
    PublishedFile(
        "workloads/servegen_deepseek_r1_clients.npz",
        912860,
        "38a9663436282d11a1d1d1966b0dff1ca8646a9c50b3f948c9c35fa1e1dc60f7",
        _SERVEGEN,
    ),
)
