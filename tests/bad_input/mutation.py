"""Spoiling bytes: at random, and where it hurts: in the structure of JSON, safetensors headers and names."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from bad_input.inputs import MARK

NUMBERS = [
    0, -1, 1, 2, 3, 7, 31, 32, 64, 127, 255, 256, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**9, 10**30, 10**400, 0.5, 1.0, -0.0, 1e-9, 1e30, 1e308, -1e308,
    float("nan"), float("inf"),
]  # fmt: skip
TEXTS = [
    "", " ", ".", "..", "/", "../x", "../../etc/passwd", "/etc/passwd", "C:\\x", "\\\\server\\x", "a\0b",
    "\x1b[2J", "\x9b", "\ud800", "\udc80", "\u202e", "\U0001f600", "n" * 600, "x" * 70_000, "__metadata__",
    "__class__", "__init__", "None", "true", "auto", "cpu", "cuda", "meta", "disk", "F32", "F16", "BF16", "I64",
    "U8", "BOOL", "F4", "F8_E4M3", "C64", "float16", "torch.load", "os.system", "eager", "sdpa",
    "flash_attention_2", "org/kernel", "llama", "gpt2", "mistral", "default", "linear", "dynamic", "yarn",
    "longrope", "llama3", "bitsandbytes", "gptq", "awq", "weight_only", "nf4", "fp4", "static", "hybrid",
    "never", "all-linear", "(a+)+$", ".*", "q_proj", "LORA", "gaussian", "silu", "gelu_new",
    "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "config.json",
    f"{MARK}.{MARK}",
]  # fmt: skip
KEYS = [
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_parameters",
    "rope_scaling", "rope_theta", "rope_type", "factor", "short_factor", "long_factor", "tie_word_embeddings",
    "dtype", "torch_dtype", "hidden_act", "auto_map", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "trust_remote_code", "architectures", "quantization_config",
    "quant_method", "bits", "group_size", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
    "llm_int8_skip_modules", "modules_to_not_convert", "use_kernels", "kernel_config", "name_or_path",
    "_name_or_path", "eos_token_id", "pad_token_id", "bos_token_id", "sliding_window", "attention_bias",
    "mlp_bias", "use_cache", "output_attentions", "return_dict", "n_layer", "n_embd", "n_head", "n_positions",
    "n_inner", "metadata", "weight_map", "total_size", "__metadata__", "shape", "data_offsets", "max_length",
    "max_new_tokens", "num_beams", "do_sample", "temperature", "top_k", "top_p", "stop_strings",
    "bad_words_ids", "cache_implementation", "custom_generate", "num_return_sequences", "early_stopping", "r",
    "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path", "to_dict", "validate",
    "save_pretrained", "config", "__dict__", "extra", "x",
]  # fmt: skip


class Mutator:
    """Draws everything from one seeded source, so that a run can be repeated."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def flat(self, data: bytes, other: bytes) -> bytes:
        """A few changes of bytes, blind to what they mean."""
        pick, held = self.random, bytearray(data)
        for _ in range(pick.choice((1, 1, 2, 4))):
            at = pick.randrange(len(held) + 1)
            act = pick.randrange(8)
            if act == 0 and at < len(held):
                held[at] ^= 1 << pick.randrange(8)
            elif act == 1 and at < len(held):
                held[at] = pick.choice(b'\0\xff\x80\x7f"\\{}[],:09-+.eE \n')
            elif act == 2:
                held[at:at] = pick.randbytes(pick.choice((1, 2, 8)))
            elif act == 3:
                del held[at : at + pick.choice((1, 2, 8, 64))]
            elif act == 4:
                held[at:at] = held[at : at + pick.choice((1, 8, 64, 512))]
            elif act == 5:
                del held[at:]
            elif act == 6 and other:
                start = pick.randrange(len(other))
                held[at : at + 16] = other[start : start + pick.choice((4, 16, 64))]
            else:
                held[at : at + 8] = pick.choice((0, 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)).to_bytes(8, "little")
        return bytes(held)

    def front(self, data: bytes, other: bytes) -> bytes:
        """Blind changes, most of them where headers are."""
        if self.random.random() < 0.2:
            return self.flat(data, other)
        place = self.random.choice((64, 600, 2400))
        return self.flat(data[:place], other[:place]) + data[place:]

    def text(self, data: bytes, other: bytes) -> bytes:
        """JSON with a few nodes changed, or blind changes if it is none."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            return self.flat(data, other)
        if self.random.random() < 0.15:
            return self.flat(data, other)
        try:
            for _ in range(self.random.choice((1, 1, 1, 2, 3))):
                content = self._node(content)
            text = json.dumps(content, ensure_ascii=self.random.random() < 0.5)
        except (RecursionError, ValueError):
            return data
        if self.random.random() < 0.05 and text.startswith("{") and len(text) > 4:  # a name twice
            text = text[:-1] + ", " + text[1:]
        return text.encode("utf-8", "surrogatepass")

    def header(self, data: bytes, other: bytes) -> bytes:
        """A safetensors file with its header changed as JSON, or spoilt blindly; the length may lie."""
        pick = self.random
        length = int.from_bytes(data[:8], "little")
        if pick.random() < 0.2 or length > len(data) - 8:
            return self.flat(data, other)
        head = self.text(data[8 : 8 + length], b"")
        said = len(head)
        if pick.random() < 0.1:
            said = pick.choice((0, 1, said - 1, said + 1, said + 8, len(data), 1 << 27, (1 << 63), (1 << 64) - 1))
        body = data[8 + length :]
        if pick.random() < 0.1:
            body = body[: pick.randrange(len(body) + 1)] + bytes(pick.choice((0, 4, 64)))
        return max(said, 0).to_bytes(8, "little") + head + body

    def _node(self, content: Any) -> Any:
        """The tree with one node replaced, taken out, doubled, renamed or exchanged with another."""
        places = list(_places(content))
        pick = self.random
        if not places:
            return self._value(content)
        parent, key = pick.choice(places)
        act = pick.randrange(9)
        if act <= 4:
            parent[key] = self._value(parent[key])
        elif act == 5:
            del parent[key]
        elif act == 6:
            other, at = pick.choice(places)
            parent[key] = copy.deepcopy(other[at])
        elif isinstance(parent, dict):
            named = pick.choice((pick.choice(KEYS), pick.choice(KEYS), pick.choice(TEXTS)))
            parent[named] = parent.pop(key) if act == 7 else self._value(None)
        else:
            parent.insert(key, self._value(parent[key]))
        return content

    def _value(self, old: Any) -> Any:
        pick = self.random
        kinds: list[Callable[[], Any]] = [
            lambda: pick.choice(NUMBERS), lambda: pick.choice(NUMBERS), lambda: pick.choice(TEXTS),
            lambda: pick.choice((True, False, None)), lambda: pick.choice(([], {}, [old], {"x": old}, [[old]])),
            lambda: old + pick.choice((-1, 1, 8)) if type(old) in (int, float) else pick.randrange(70),
            lambda: str(old)[:100], lambda: {pick.choice(KEYS): pick.choice(NUMBERS)},
            lambda: [pick.choice(NUMBERS)] * 4, lambda: _deep(pick.choice((5, 40, 70, 300, 2000))),
        ]  # fmt: skip
        return pick.choice(kinds)()


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a tree, at most two thousand."""
    found: list[tuple[Any, Any]] = []
    level = [content]
    while level and len(found) < 2000:
        inner: list[Any] = []
        for value in level:
            if isinstance(value, (dict, list)):
                for key in list(value) if isinstance(value, dict) else range(len(value)):
                    found.append((value, key))
                    inner.append(value[key])
        level = inner
    return found


def _deep(count: int) -> Any:
    value: Any = 1
    for number in range(count):
        value = [value] if number % 2 else {"x": value}
    return value
