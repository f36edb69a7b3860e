"""``from_pretrained`` on a device mesh: the ranks that load together, the one that downloads, what cannot be spread.

Every rank calls it. They meet to say what they see, before anything is read: a rank that fails makes all of them fail.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from ..errors import ParallelError

if TYPE_CHECKING:
    from ..loading.parallel_agree import Agreement
    from ..loading.parallel_load import Spread
    from ..loading.parallel_mesh import Layout
    from ..loading.source import Source
    from .causal_lm import CausalLM

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Joined:
    """What ``device_mesh`` is inside of `across_ranks`: the layout, and the ranks' agreement."""

    def __init__(self, layout: Layout, agreement: Agreement) -> None:
        self.layout, self.agreement = layout, agreement
        self._styles: dict[str, Any] = {}

    def spread(self, model: CausalLM, commit: str | None) -> Spread:
        """How a model on meta is to be spread. Raises ParallelError if it cannot be."""
        from ..loading.parallel_load import Spread
        from ..loading.parallel_packed import share_out_packed
        from .parallel_heads import check_heads
        from .parallel_plan import cuts_of, styles_of

        if self.layout.tp is not None:
            self._styles = styles_of(model, self.layout.config.tp_plan)
            gathers = any(style.name == "colwise_key_heads" for style in self._styles.values())
            check_heads(model.config, self.layout.tp_size, gathers)
        if self.layout.pp is not None:
            self._take_stage(model)
        cuts = cuts_of(model, self._styles)
        codes = share_out_packed(model) if model.is_quantized else {}
        folded = {name: tuple(model.get_parameter(name).shape) for name, cut in cuts.items() if cut.parts > 1}
        self.layout = replace(self.layout, folded=folded, codes=codes)
        units = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
        if self.layout.fsdp is not None and not units:
            raise ParallelError(
                f"{type(model).__name__} names no class of its layers in _no_split_modules, so FSDP would gather the "
                "whole model at once; declare it"
            )
        return Spread(self.layout, self.agreement, cuts, units, commit)

    def _take_stage(self, model: CausalLM) -> None:
        from .pipeline import Elsewhere, PassedOn, take_stage

        self.layout = replace(self.layout, shared=take_stage(model, self.layout))
        here = {name for name, module in model.named_modules() if not isinstance(module, (Elsewhere, PassedOn))}
        self._styles = {name: style for name, style in self._styles.items() if name in here}

    def finish(self, model: CausalLM) -> None:
        """Make the forwards those of the loaded weights, once all ranks have theirs."""
        self.agreement.meet()
        self.agreement.over = True  # what fails from here on fails alike, or is one rank's own affair
        model.layout = self.layout
        if self.layout.pp is not None:
            from .pipeline import become_stage

            become_stage(model)
        self.layout.spread.update(model.modules())
        if self.layout.tp is not None:
            from ..loading.parallel_states import usual_states
            from .parallel_forward import parallelize_forwards
            from .parallel_heads import key_heads

            usual_states(model, self.layout.folded)
            group = self.layout.tp.get_group()
            parallelize_forwards(model, self._styles, group, key_heads(model.config, group))
            _share_randomness(group)


def across_ranks(method: _Method) -> _Method:
    """A ``from_pretrained`` that takes ``device_mesh`` and ``parallel``: with a mesh all of its ranks fail if one does.

    Inside, ``device_mesh`` is a `Joined`, and ``parallel`` is part of it.
    """

    @functools.wraps(method)
    def from_pretrained(cls: Any, name: Any, *args: Any, device_mesh: Any = None, parallel: Any = None, **kwargs: Any):  # type: ignore[no-untyped-def]
        if device_mesh is None:
            if parallel is not None:
                raise ParallelError(f"parallel={parallel!r} needs device_mesh=, the ranks to spread the model over")
            return method(cls, name, *args, **kwargs)
        if isinstance(device_mesh, Joined):
            return method(cls, name, *args, device_mesh=device_mesh, **kwargs)
        from ..loading.parallel_agree import Agreement
        from ..loading.parallel_mesh import check_mesh, make_layout

        mesh = check_mesh(device_mesh)
        agreement = Agreement(mesh)
        try:
            joined = Joined(make_layout(mesh, parallel), agreement)
            kwargs = _at_one_commit(agreement, name, kwargs)
            return method(cls, name, *args, device_mesh=joined, **kwargs)
        except BaseException as error:
            agreement.fail(error)
            raise

    return cast(_Method, from_pretrained)


def _at_one_commit(agreement: Agreement, name: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which every rank finds the same files: of a Hub repository one rank of each node brings them,
    and all take them from the cache at its commit."""
    here = not isinstance(name, (str, os.PathLike)) or os.path.isdir(os.path.expanduser(name))
    told = agreement.meet(host=socket.gethostname(), here=here, name=str(name))
    if all(facts["here"] for facts in told.values()):
        return kwargs
    lacking = [rank for rank, facts in told.items() if not facts["here"]]
    if len(lacking) < len(told):
        agreement.over = True  # all ranks have seen this
        raise ParallelError(
            f"ranks {', '.join(map(str, lacking[:8]))} have no directory {str(name)!r}, others have one; every node "
            "needs the files at that place"
        )
    me = torch.distributed.get_rank()
    mine = told[me]["host"]
    first = min(rank for rank, facts in told.items() if facts["host"] == mine)
    commit = _download(name, kwargs) if first == me else None
    commits = {facts["commit"] for facts in agreement.meet(commit=commit).values()} - {None}
    if len(commits) > 1:
        agreement.over = True
        raise ParallelError(
            f"{name!r} was at different commits on different nodes: {', '.join(sorted(commits))}; pass revision="
        )
    found = {**kwargs, "revision": commits.pop()} if commits else kwargs
    found.pop("force_download", None)
    if found.get("trust_remote_code") is not True and not found.get("verify"):
        found["local_files_only"] = True
    return found


def _download(name: Any, kwargs: dict[str, Any]) -> str | None:
    """Bring what loading will need of a Hub repository into the cache; its commit."""
    from ..loading.checkpoint import open_checkpoint
    from ..loading.gguf import gguf_headers
    from ..loading.source import HUB_ARGUMENTS
    from .adapters.source import AdaptedSource
    from .origin import Origin

    origin = Origin(*(kwargs.get(name) for name in Origin._fields))
    source = origin.source(name, {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}, kwargs.get("config"))
    for file in ("config.json", "generation_config.json"):
        source.find(file)
    if origin.gguf_file is not None:
        gguf_headers(source, origin.gguf_file)  # which brings all files of one in parts
    elif origin.state_dict is None:
        open_checkpoint(source, variant=origin.variant, use_safetensors=origin.use_safetensors)
    if isinstance(source, AdaptedSource):
        from .adapters.files import WEIGHTS

        source.adapter.find(WEIGHTS)
        return source.adapter.commit  # what revision= means
    return source.commit


def refuse_on_mesh(layout: Layout, source: Source, device_map: Any, max_memory: Any, quantizer: Any) -> None:
    """ParallelError for what cannot be spread over a mesh."""
    from .adapters.source import AdaptedSource

    if device_map is not None or max_memory is not None:
        raise ParallelError(
            "device_map (or max_memory) and device_mesh were both given; the mesh says where weights live"
        )
    if quantizer is not None and (layout.tp is not None or layout.pp is not None):
        raise ParallelError(
            f"quantized weights cannot be cut for tensor parallelism or a pipeline ({layout.describe()}): blocks of "
            "codes go across their parts; give a mesh whose dimensions are fsdp's alone, or load without quantization"
        )
    if quantizer is not None and layout.config.mixed_precision is not None:
        raise ParallelError(
            "mixed_precision would cast codes, which are no numbers; a quantized model computes in "
            "bnb_4bit_compute_dtype, and its other weights are in dtype=: set these, and leave mixed_precision out"
        )
    if isinstance(source, AdaptedSource):
        refuse_adapters(layout)


def refuse_adapters(layout: Layout) -> None:
    """ParallelError if adapters cannot be put on a model that is spread so."""
    if layout.tp is not None or layout.pp is not None:
        raise ParallelError(
            "an adapter cannot be put on a model that is cut for tensor parallelism or a pipeline "
            f"({layout.describe()}): its matrices would be nobody's share; use a mesh whose dimensions are fsdp's "
            "alone, or merge the adapter into its base on one process (merge_and_unload, save_pretrained) and load that"
        )


def check_all_spread(model: CausalLM) -> None:
    """ParallelError for weights that would be trained on each rank by itself, so that ranks come apart."""
    layout = model.layout
    if layout.fsdp is None or not torch.is_grad_enabled():
        return
    for name, module in model.named_modules():
        if module not in layout.spread and any(p is not None and p.requires_grad for p in module._parameters.values()):
            raise ParallelError(
                f"{name} came onto the model after it was spread over its device mesh, and every rank would train "
                "weights of its own; call loadstone.shard_new_weights(model) on all ranks, before the optimizer is made"
            )


def class_of(model: Any) -> type:
    """The architecture's class of a model, whose own class FSDP may have made from it."""
    from_fsdp = isinstance(model, nn.Module) and getattr(model, "layout", None) is not None
    if not from_fsdp:
        return type(model)
    from torch.distributed.fsdp import FSDPModule

    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def _share_randomness(group: Any) -> None:
    """Give the ranks that share each layer's work the first one's random state: dropout between layers must fall alike
    on all of them."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    torch.distributed.broadcast_object_list(states, group_src=0, group=group)
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1])
