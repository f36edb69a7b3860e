"""Any checkpoint that is read, as safetensors, by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading.checkpoint import INDEX, SINGLE, with_variant
from ..loading.pickled import INDEX as PICKLED_INDEX
from ..loading.pickled import SINGLE as PICKLED
from ..loading.source import HUB_ARGUMENTS, Source, resolve_source
from .auto import row_for
from .choice import trust_of
from .remote_class import own_model_class

if TYPE_CHECKING:
    import torch

    from ..models.convert import Converted


def convert_checkpoint(
    name_or_path: str | os.PathLike[str] | Source,
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    use_safetensors: bool | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool | None = None,
    code_revision: str | None = None,
    watch: Callable[[int, int], None] = lambda done, total: None,
    **hub: Any,
) -> Converted:
    """Write a checkpoint as safetensors to ``directory``, from files to files; ``loadstone convert`` does this.

    name_or_path: a directory, a Hub repository id, or a GGUF file. What is read: ``gguf_file`` if given, else
        safetensors (of ``variant``), else ``pytorch_model.bin`` or its shards, which runs nothing; these at once with
        ``use_safetensors=False``.
    dtype: of the weights; None: each tensor keeps its own, GGUF's blocks become float32. Packed layers stay as they
        are. max_shard_size: as for ``save_pretrained``. watch: called with bytes done and in total.
    trust_remote_code, code_revision, and for the Hub cache_dir, force_download, local_files_only, proxies, token,
        revision, subfolder, verify: as for `AutoModelForCausalLM.from_pretrained`.
    config.json and generation_config.json are written anew, tokenizer files copied. Takes memory for one tensor. A
    checkpoint in ``directory`` is replaced in one step, a crash leaves the old one.
    Returns what was read and written. Raises PathError for a directory that is the source or holds something else than
    a checkpoint; MissingWeightsError if weights are missing, which are not made up; CheckpointError if the disk has no
    room; and what loading raises; before anything is written all but a source that changes meanwhile.
    """
    from ..errors import ArgumentError, nearest
    from ..models.convert import convert
    from ..models.origin import Origin

    for name in hub:
        if name not in HUB_ARGUMENTS:
            raise ArgumentError(f"convert_checkpoint got an unknown argument {name!r}{nearest(name, HUB_ARGUMENTS)}")
    if isinstance(name_or_path, (str, os.PathLike)) and gguf_file is None:
        path = Path(name_or_path)
        if path.suffix == ".gguf" and path.is_file():
            name_or_path, gguf_file = path.absolute().parent, path.name
    origin = Origin(variant, use_safetensors, None, gguf_file)
    origin.check()
    source = resolve_source(name_or_path, **hub)  # an adapter alone is no checkpoint to convert: it has no config.json
    if gguf_file is None and use_safetensors is None and _only_pickled(source, variant):
        origin = origin._replace(use_safetensors=False)
    row = row_for(source, None, hub, trust_of(trust_remote_code, code_revision, hub, hub.get("revision")), gguf_file)
    return convert(
        own_model_class(row),
        source,
        directory,
        origin=origin,
        dtype=dtype,
        max_shard_size=max_shard_size,
        watch=watch,
    )


def _only_pickled(source: Source, variant: str | None) -> bool:
    """Whether there are pickled weights and no others."""

    def there(*names: str) -> bool:
        return any(source.find(with_variant(name, variant)) is not None for name in names)

    return not there(SINGLE, INDEX) and there(PICKLED, PICKLED_INDEX)
