"""Where a model's configuration and weights come from, as the caller of ``from_pretrained`` said it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import ArgumentError
from ..loading.checkpoint import Checkpoint, open_checkpoint
from ..loading.source import Source, resolve_source
from .adapters.source import with_base
from .configuration import PreTrainedConfig


class Origin(NamedTuple):
    """The arguments of ``from_pretrained`` that choose among sources of weights; none: safetensors."""

    variant: str | None = None
    use_safetensors: bool | None = None
    state_dict: Mapping[str, Tensor] | None = None
    gguf_file: str | None = None

    def source(self, name_or_path: str | os.PathLike[str] | Source | None, hub: dict[str, Any], config: Any) -> Source:
        """The directory or repository. Without a name, which needs ``state_dict`` and a configuration, one of no files.

        hub: keywords of `resolve_source`. Raises ArgumentError for arguments that contradict each other.
        """
        self.check()
        if self.gguf_file is not None:
            return resolve_source(name_or_path, **hub)  # type: ignore[arg-type]  # None is an error of its own there
        if name_or_path is not None:
            return with_base(resolve_source(name_or_path, **hub), hub)
        if self.state_dict is None or not isinstance(config, PreTrainedConfig):
            raise ArgumentError(
                "from_pretrained(None) needs both config=, a configuration object, and state_dict=, the weights; or "
                "pass a directory or a Hub repository id as the first argument"
            )
        from ..loading.state_dict import NoSource

        return NoSource(config.name_or_path, None)

    def check(self) -> None:
        """Raise ArgumentError if more than one of them says where the weights come from."""
        chosen = {"state_dict": self.state_dict, "gguf_file": self.gguf_file, "variant": self.variant}
        given = [name for name, value in chosen.items() if value is not None]
        if len(given) > 1:
            raise ArgumentError(f"{'= and '.join(given)}= each say where the weights come from; pass one of them")

    def configuration(self, cls: type[PreTrainedConfig], source: Source, **overrides: Any) -> PreTrainedConfig:
        """The configuration, of class ``cls``: config.json's, or what a GGUF file says."""
        place: dict[str, Any] = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return cls.from_pretrained(source, **place, **overrides)

    def checkpoint(self, source: Source) -> Checkpoint:
        """The tensors and where they lie; no weight is read."""
        if self.state_dict is not None:
            from ..loading.state_dict import held_checkpoint

            return held_checkpoint(self.state_dict)
        if self.gguf_file is not None:
            from .gguf import gguf_weights

            return gguf_weights(source, self.gguf_file)
        return open_checkpoint(source, variant=self.variant, use_safetensors=self.use_safetensors, early=True)
