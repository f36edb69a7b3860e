"""The methods that adapters give every causal language model, under the names users of transformers and PEFT know."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentError
from ...loading.source import HUB_ARGUMENTS, Source, resolve_source

if TYPE_CHECKING:
    from .config import LoraConfig


class AdapterMethods:
    """LoRA adapters on a `CausalLM`; see docs/adapters.md.

    ``adapters``: {name: configuration}; ``active_adapter``: the one in use, None for none.
    """

    adapters: dict[str, LoraConfig] = {}
    active_adapter: str | None = None

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Put new, untrained LoRA matrices beside the layers that ``adapter_config`` names, and make them active.

        adapter_config: a `LoraConfig`, PEFT's, or a dictionary of its fields. Everything else is frozen.
        Raises ConfigError for a configuration or targets that cannot be; ArgumentError for a name in use.
        """
        from .attach import add_adapter

        add_adapter(self, adapter_config, adapter_name)  # type: ignore[arg-type]

    def load_adapter(
        self,
        adapter: str | os.PathLike[str] | Source,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **hub: Any,
    ) -> None:
        """Load an adapter in PEFT's format onto this model, and make it active.

        adapter: a directory or a Hub repository id; ``cache_dir``, ``token``, ``revision``, ... as for
        ``from_pretrained``. is_trainable: whether its matrices get gradients.
        Raises, before the model changes, NotFoundError, ConfigError, UnsafeFormatError for a pickle, FormatError,
        UnexpectedWeightsError, MissingWeightsError, ShapeMismatchError.
        """
        from .files import load_adapter

        for name in hub:
            if name not in HUB_ARGUMENTS:
                raise ArgumentError(f"load_adapter got an unknown argument {name!r}")
        load_adapter(self, resolve_source(adapter, **hub), adapter_name, is_trainable)  # type: ignore[arg-type]

    def save_adapter(self, save_directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors, in one step; default: the active adapter."""
        from .files import save_adapter

        save_adapter(self, save_directory, adapter_name)  # type: ignore[arg-type]

    def set_adapter(self, adapter_name: str) -> None:
        """Make another adapter the active one, and the one that is trained."""
        from .attach import set_adapter

        set_adapter(self, adapter_name)  # type: ignore[arg-type]

    def disable_adapters(self) -> None:
        """Run without adapters, until `set_adapter` or `enable_adapters`."""
        from .attach import set_adapter

        set_adapter(self, None)  # type: ignore[arg-type]

    def enable_adapters(self) -> None:
        """Run with the adapter added last."""
        if not self.adapters:
            raise ArgumentError("the model has no adapters; add_adapter or load_adapter first")
        self.set_adapter(list(self.adapters)[-1])

    def active_adapters(self) -> list[str]:
        """The name of the active adapter in a list, or an empty one."""
        return [] if self.active_adapter is None else [self.active_adapter]

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter out of the model."""
        from .attach import delete_adapter

        delete_adapter(self, adapter_name)  # type: ignore[arg-type]

    def merge_adapter(self) -> None:
        """Add the active adapter to the weights, so that it costs nothing to run. Packed weights are encoded anew."""
        from .attach import merge

        merge(self)  # type: ignore[arg-type]

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`: bit for bit for packed weights, within their dtype's rounding for plain ones."""
        from .attach import unmerge

        unmerge(self)  # type: ignore[arg-type]

    def merge_and_unload(self) -> Any:
        """Add the active adapter to the weights and take all adapters out; returns the model, then a plain one."""
        from .attach import merge, unload

        if self.active_adapter is not None:
            merge(self)  # type: ignore[arg-type]
            unload(self)  # type: ignore[arg-type]
            return self
        raise ArgumentError("no adapter is active; set_adapter(name) first")

    def unload(self) -> Any:
        """Take all adapters out; returns the model as it was without them."""
        from .attach import unload, unmerge

        unmerge(self)  # type: ignore[arg-type]
        unload(self)  # type: ignore[arg-type]
        return self

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether there are adapters: transformers' Trainer refuses a quantized model without."""
        return bool(self.adapters)
