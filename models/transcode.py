"""A checkpoint quantized from files to files: what `CausalLM.from_pretrained` and ``save_pretrained`` would write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import PathError, QuantizationError
from ..loading.plan import Plan
from ..loading.source import LocalSource, Source
from ..loading.transcode import Beside, Transcoded, transcode
from .causal_lm import CausalLM
from .pretrained import generation_config_of, texts_of
from .preview import Preview, preview

# What tokenizers of the Hub are made of, and how chats are written for them.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Quantized(NamedTuple):
    """``modules``: names of the layers that hold codes now; ``plain``: linear layers left as they are."""

    written: Transcoded
    model_class: str
    modules: list[str]
    plain: list[str]


def quantize_checkpoint(
    cls: type[CausalLM],
    source: Source,
    directory: str | os.PathLike[str],
    quantization_config: Any,
    *,
    dtype: torch.dtype | str | None = None,
    variant: str | None = None,
    max_shard_size: int | str = "50GB",
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Quantized:
    """Write ``source`` quantized to ``directory``; memory for one tensor, no model.

    The tensors are byte for byte those of ``cls.from_pretrained(source, quantization_config=...)`` saved; with more
    than one shard and double quantization, a cut may fall a tensor earlier. Tokenizer files are copied. dtype: of what
    is not quantized (None: config.json's). variant: of the source's files. watch: called with bytes done and in total.
    Raises QuantizationError for a source that is quantized already, PathError for a directory that is the source or
    holds something else than a checkpoint, and what loading and `transcode` raise.
    """
    target = Path(directory)
    check_target(source, target)
    if getattr(cls.config_class.from_pretrained(source), "quantization_config", None) is not None:
        raise QuantizationError(f"{source.name} is quantized already; quantize the checkpoint it was made from")
    seen = preview(cls, source, dtype=dtype, variant=variant, quantization_config=quantization_config)
    written, _ = rewrite(seen, seen.plan, source, target, seen.checkpoint.total_bytes, max_shard_size, watch)
    model = seen.model
    packed = seen.plan.tree.packed
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return Quantized(written, type(model).__name__, list(packed), [name for name in linear if name not in packed])


def rewrite(
    seen: Preview,
    plan: Plan,
    source: Source,
    target: Path,
    total: int,
    max_shard_size: int | str,
    watch: Callable[[int, int], None],
) -> tuple[Transcoded, int]:
    """Write what ``plan`` makes of the source; what was written, and of how many bytes ``watch`` has heard."""
    model, done = seen.model, 0
    model.generation_config = generation_config_of(None, source, seen.config)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        watch(done, total)

    written = transcode(
        plan,
        seen.checkpoint,
        model.state_dict(),
        target,
        _beside(model, source),
        ties=tuple(model.active_ties()),
        max_shard_size=max_shard_size,
        watch=advance,
    )
    return written, done


def _beside(model: CausalLM, source: Source) -> Beside:
    """The other files of a checkpoint: what saving the model writes, and the source's tokenizer."""
    copies = {name: path for name in TOKENIZER_FILES if (path := source.find(name)) is not None}
    return Beside(texts_of(model), copies)


def check_target(source: Source, target: Path) -> None:
    """PathError unless the target is new, empty, or a checkpoint that is not the source."""
    real = Path(os.path.realpath(target))
    if isinstance(source, LocalSource) and real == Path(os.path.realpath(source.directory)):
        raise PathError(f"{str(target)!r} is the source itself; write to another directory")
    if real.is_dir() and any(real.iterdir()) and not (real / "config.json").exists():
        raise PathError(
            f"directory {str(target)!r} holds files and no config.json: it is no checkpoint that could be replaced; "
            "name a new or an empty directory"
        )
