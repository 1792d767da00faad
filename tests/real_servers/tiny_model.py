# mypy: disable-error-code="import-not-found, import-untyped"
"""A tiny model, made on the spot: a real Qwen2 whose weights are set so that it says what we know.

    python tiny_model.py gguf FILE        (needs gguf)
    python tiny_model.py safetensors DIR  (needs safetensors)

Runs in a server's own environment, not in bargein's. The attention and the feed-forward layers are
computed, so a token costs time, and add nothing; what is left is the last token's embedding, and
the output layer maps it to the next token. The last character of the last message chooses the
answer, since it is one token with all that follows in the prompt:

    …0          1234567890 over and over, for ever
    …?          one function call in Qwen's form, then the end
    …all else   100.101. and so on to 299., a token each, then the end
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, LAYERS, HEADS, FEED_FORWARD = 512, 4, 8, 4096
"""30 million weights: tens to hundreds of tokens a second on one core."""
CONTEXT = 32768
EPSILON = 1e-6
ROPE_BASE = 10000.0

CALL = ["<tool_call>", '\n{"name": "open_map", ', '"arguments": {"hall": 3}}\n', "</tool_call>"]
"""A token each, since a token is all that this model remembers; llama-cpp-python gives nothing for
one of over 32 bytes."""
NUMBERS = [f"{number}." for number in range(100, 300)]
TURN = "<|im_end|>\n<|im_start|>assistant\n"
"""What stands between the last message and the answer."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = [*SPECIAL, *CALL, *NUMBERS, TURN, "0" + TURN, "?" + TURN]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vocabulary() -> list[str]:
    """Every token's text, as the vocabulary has it, by number."""
    return [*byte_letters(), *ADDED]


def successors() -> list[int]:
    """The token after each token, by number."""
    added = {text: 256 + place for place, text in enumerate(ADDED)}
    follow = [added[NUMBERS[0]]] * (256 + len(ADDED))
    for digit in range(10):
        follow[ord("0") + digit] = ord("0") + (digit + 1) % 10
    follow[added["0" + TURN]] = ord("1")
    for chain in (["?" + TURN, *CALL, "<|im_end|>"], [*NUMBERS, "<|im_end|>"]):
        for now, after in pairwise(chain):
            follow[added[now]] = added[after]
    return follow


def weights() -> dict[str, Any]:
    """Every tensor (32-bit floats) under its name in transformers."""
    follow = successors()
    size = len(follow)

    def zeros(*shape: int) -> Any:
        return np.zeros(shape, np.float32)

    def ones() -> Any:
        return np.ones(HIDDEN, np.float32)

    embedding, output = zeros(size, HIDDEN), zeros(size, HIDDEN)
    for token, after in enumerate(follow):
        embedding[token, token] = 1
        output[after, token] = 2  # times √HIDDEN, from the norm: no temperature gets over that
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": ones(),
        "lm_head.weight": output,
    }
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        tensors[f"{layer}.input_layernorm.weight"] = ones()
        tensors[f"{layer}.post_attention_layernorm.weight"] = ones()
        for name in "qkvo":
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = zeros(HIDDEN, HIDDEN)
            if name != "o":
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = zeros(HIDDEN)
        tensors[f"{layer}.mlp.gate_proj.weight"] = zeros(FEED_FORWARD, HIDDEN)
        tensors[f"{layer}.mlp.up_proj.weight"] = zeros(FEED_FORWARD, HIDDEN)
        tensors[f"{layer}.mlp.down_proj.weight"] = zeros(HIDDEN, FEED_FORWARD)
    return tensors


def write_safetensors(folder: Path) -> None:
    """Write the folder that transformers and vLLM load: weights, configuration, tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    numbers = {text: number for number, text in enumerate(vocabulary())}
    end, pad = numbers["<|im_end|>"], numbers["<|endoftext|>"]
    ends: dict[str, Any] = {"eos_token_id": end, "pad_token_id": pad, "bos_token_id": None}
    files = {
        "config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": FEED_FORWARD,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": EPSILON,
            "rope_theta": ROPE_BASE,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vocab_size": len(numbers),
            **ends,
        },
        "generation_config.json": {"do_sample": False, "max_new_tokens": CONTEXT - 1024, **ends},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
        "tokenizer.json": {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": numbers[text],
                    "content": text,
                    "special": text in SPECIAL,
                    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                }
                for text in ADDED
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
            "post_processor": None,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "vocab": {letter: number for number, letter in enumerate(byte_letters())},
                "merges": [],
            },
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_gguf(file: Path) -> None:
    """Write the file that llama.cpp loads."""
    import gguf

    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(ROPE_BASE)
    tokens = vocabulary()
    kinds = [gguf.TokenType.NORMAL] * 256
    kinds += [
        gguf.TokenType.CONTROL if text in SPECIAL else gguf.TokenType.USER_DEFINED for text in ADDED
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])  # none is no list; this one makes no token that is known
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, LAYERS)
    for name, tensor in weights().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    {"gguf": write_gguf, "safetensors": write_safetensors}[sys.argv[1]](Path(sys.argv[2]))
