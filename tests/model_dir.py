"""Model directories made on the spot: a real model's config, a small tokenizer, no weights.

vLLM serves them with --load-format dummy. The tokenizer is a byte-level BPE trained here on a fixed text of invented
words, so that a directory is the same bytes on every machine and nothing has to be fetched.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path

END_OF_TEXT, MESSAGE_START, MESSAGE_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The ids of the three above; the end of a message ends generation.
BOS_ID, EOS_ID = 0, 2
NUM_MERGES = 1200

_QWEN3: Mapping[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}

# The published config.json of each model, without what only its weights need.
CONFIGS: Mapping[str, Mapping[str, object]] = {
    "qwen3-tiny": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    "qwen3-moe-tiny": {
        **_QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "mlp_only_layers": [],
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    },
}

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model_dir(folder: Path, shape: str, **changes: object) -> Path:
    """Write the model directory of a shape in CONFIGS, single config fields changed by keyword; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", {**CONFIGS[shape], **changes})
    _write(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID], "do_sample": False})
    (folder / "tokenizer.json").write_text(_tokenizer(), encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": MESSAGE_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": 131072,
        "chat_template": CHAT_TEMPLATE,
    }
    _write(folder / "tokenizer_config.json", tokenizer_config)
    return folder


@functools.cache
def _tokenizer() -> str:
    """tokenizer.json: special tokens, the 256 byte symbols, then one token per merge."""
    symbols, merges = list(_byte_symbols().values()), _train_merges(_words(), NUM_MERGES)
    tokens = [END_OF_TEXT, MESSAGE_START, MESSAGE_END, *symbols, *(left + right for left, right in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": [f"{left} {right}" for left, right in merges],
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": tokens[number], **flags} for number in range(3)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    return json.dumps(document, ensure_ascii=False)


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself where it prints, else the next one from U+0100 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printing}
    others = [byte for byte in range(256) if byte not in symbols]
    return symbols | {byte: chr(0x100 + place) for place, byte in enumerate(others)}


def _words() -> dict[str, int]:
    """Invented words with a space before each (as byte symbols), how often each occurs falling like Zipf's law."""
    source = random.Random(20260921)
    onsets = "b c d f g h l m n p r s t v w st tr pl".split()
    vowels, codas = "a e i o u ou ea".split(), ["", "n", "r", "s", "t"]
    space = _byte_symbols()[ord(" ")]
    words: dict[str, int] = {}
    for rank in range(1, 1201):
        syllables = range(source.randint(1, 3))
        word = "".join(source.choice(onsets) + source.choice(vowels) + source.choice(codas) for _ in syllables)
        words[space + word] = words.get(space + word, 0) + 60_000 // rank
    return words


def _train_merges(words: dict[str, int], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: merge the most frequent adjacent pair up to `count` times; ties go by the pair."""
    pieces = {word: list(word) for word in words}
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    holders: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for word, parts in pieces.items():
        for pair in itertools.pairwise(parts):
            pairs[pair] += words[word]
            holders[pair].add(word)
    merges: list[tuple[str, str]] = []
    while len(merges) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] <= 0:
            break
        merges.append(best)
        for word in holders.pop(best):
            parts = pieces[word]
            for pair in itertools.pairwise(parts):
                pairs[pair] -= words[word]
            pieces[word] = merged = _merge(parts, best)
            for pair in itertools.pairwise(merged):
                pairs[pair] += words[word]
                holders[pair].add(word)
        del pairs[best]
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _write(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
