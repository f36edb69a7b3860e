"""`PackedLinear`: the base of linear layers that hold their weight as codes, and what loading needs to know of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import QuantizationError
from .wrappers import mark_codes, watch_wrappers

if TYPE_CHECKING:
    from .shares import Gather, Part, Share


class Recipe(NamedTuple):
    """How one floating-point tensor of a checkpoint becomes tensors of a packed module.

    ``shape``: what the checkpoint's tensor must have. ``dtype``: it is cast to that first. ``makes``: the module's
    attributes that come of it. ``run``: the contiguous tensor on its target device → {attribute: tensor}, on that
    device; called by several threads, so it changes nothing in the module.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    makes: tuple[str, ...]
    run: Callable[[Tensor], dict[str, Tensor]]


class PackedLinear(nn.Linear):
    """A linear layer whose weight is held as codes: (..., in_features) → (..., out_features).

    A subclass registers its tensors as parameters (``requires_grad=False``) and persistent buffers under names without
    dots, in ``__init__`` after ``super().__init__``, on the device it is given (loading: meta), and writes ``forward``,
    `dequantized_weight` and what else it needs of:

    ``checkpoint_names``: {attribute: its name in state dicts and files}, for those where the two differ; a class
    attribute or a property. ``read_first``: attributes, small beside the codes, that `check_parts` gets with their
    values before anything is loaded. ``stay_on_cpu``: buffers of text or numbers that no forward reads.
    ``own_dtype``: attributes that keep the floating-point dtype they have in a file. ``text_room``: bytes by which a
    text of ``stay_on_cpu`` may be longer than that of a layer of zeros. And `load_recipe`, `accepts`, `check_parts`,
    `loaded`. ``shared_out``: attributes that the ranks of a device mesh share out along their first dimension; with
    it go `part_of` and `completed`. The forward gets them as `shares.as_floats` gives them.

    ``bias`` is a floating-point parameter or None; it loads as in any module.
    """

    checkpoint_names: Mapping[str, str] = {}
    loads_packed: bool = False  # from a checkpoint that holds codes: set for a load
    read_first: ClassVar[tuple[str, ...]] = ()
    stay_on_cpu: ClassVar[tuple[str, ...]] = ()
    own_dtype: ClassVar[tuple[str, ...]] = ()
    shared_out: ClassVar[tuple[str, ...]] = ()
    text_room: int = 0

    weight: nn.Parameter
    original: nn.Module | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, device: Any = None, dtype: Any = None
    ) -> None:
        nn.Module.__init__(self)
        watch_wrappers()
        self.in_features, self.out_features = in_features, out_features
        self.transposed = False
        self.source_dtype: torch.dtype = dtype or torch.get_default_dtype()
        self.__dict__["original"] = None
        empty = torch.zeros(out_features, device=device, dtype=self.source_dtype) if bias else None
        self._parameters["weight"] = None
        self._parameters["bias"] = None if empty is None else nn.Parameter(empty)

    # What a subclass says

    def load_recipe(self, attribute: str) -> Recipe | None:
        """How a floating-point checkpoint's tensor of this name becomes the module's; None if it cannot be."""
        return None

    def accepts(self, attribute: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a packed tensor from a file may take this attribute's place although its shape differs."""
        return False

    def check_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Raise QuantizationError unless the packed tensors of a checkpoint fit each other and this layer.

        parts: {attribute: tensor}, of all that hold the weight; on meta (shape and dtype only) but for ``read_first``.
        """

    def loaded(self) -> None:
        """Called when all tensors are in place: derive from them what the forward needs."""

    def dequantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out_features, in_features), in ``dtype`` or that of the tensor which was quantized."""
        raise QuantizationError(f"{type(self).__name__} cannot be dequantized")

    def part_of(self, share: Share) -> Part:
        """What a rank reads of a floating-point weight, and makes of it, for its share of what is ``shared_out``."""
        raise QuantizationError(f"{type(self).__name__} cannot be shared out")

    def completed(self, parts: Mapping[str, Tensor], share: Share, gather: Gather) -> dict[str, Tensor]:
        """All tensors of a rank's share, from what its part has made; all ranks call it together."""
        return dict(parts)

    # What every packed layer does

    @classmethod
    def from_linear(cls, linear: nn.Module, **options: Any) -> Any:
        """Quantize a linear layer (nn.Linear, or one stored in-out); from one on meta, a layer to be loaded.

        options: as for the class, bias and sizes apart. Raises QuantizationError for a class that only reads codes.
        """
        weight: Any = linear.weight
        out_features, in_features = weight.shape[::-1] if holds_in_out(linear) else weight.shape
        has_bias = linear.bias is not None
        layer: Any = cls(in_features, out_features, has_bias, device="meta", dtype=weight.dtype, **options)
        layer.stand_in_for(linear)
        if has_bias:
            layer._parameters["bias"] = linear.bias
        if not weight.is_meta:
            if (recipe := layer.load_recipe("weight")) is None:
                raise QuantizationError(f"{cls.__name__} cannot be made from a floating-point layer, only read")
            layer.fill(recipe.run(weight.detach()))
        return layer

    @property
    def source_shape(self) -> tuple[int, int]:
        """The shape of the layer's weight in a floating-point checkpoint."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A plain layer (nn.Linear, or of the class this one took the place of) with the decoded weight."""
        weight = self.dequantized_weight(dtype).detach()
        plain = self.original
        if plain is None:
            plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        else:
            plain = copy.deepcopy(plain)
        plain._parameters["weight"] = nn.Parameter(weight.t().contiguous() if self.transposed else weight)
        if self.bias is not None:
            bias = self.bias.detach().to(weight.dtype, copy=True)
            plain._parameters["bias"] = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        plain.train(self.training)
        return plain

    def stand_in_for(self, plain: nn.Module) -> None:
        """Remember the layer this one replaces (without its weights), for `dequantize`."""
        blank = copy.copy(plain)
        blank.__dict__["_parameters"] = {
            name: None if parameter is None else nn.Parameter(parameter.detach().to("meta"))
            for name, parameter in plain._parameters.items()
        }
        self.__dict__["original"] = blank
        self.transposed = holds_in_out(plain)
        self.training = plain.training

    def fill(self, parts: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of those held, and tell the module."""
        for attribute, tensor in parts.items():
            if attribute in self._buffers:
                self._buffers[attribute] = tensor
            else:
                self._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
        self.loaded()

    def parts(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by attribute, as `fill` takes them."""
        held = {name: getattr(self, name) for name in self.packed_attributes()}
        return {name: tensor.detach() for name, tensor in held.items() if tensor is not None}

    @property
    def is_shared(self) -> bool:
        """Whether this rank holds a share of the codes alone; not while the layer runs."""
        return hasattr(self._parameters["weight"], "full_tensor")

    def packed_attributes(self) -> list[str]:
        """The attributes that hold the weight: all tensors of a state dict but the bias."""
        loose = self._non_persistent_buffers_set
        return [name for name in (*self._parameters, *self._buffers) if name != "bias" and name not in loose]

    def requires_grad_(self, requires_grad: bool = True) -> PackedLinear:
        """False freezes the bias too; True is refused: codes have no gradient."""
        if requires_grad:
            raise QuantizationError(_NO_TRAINING)
        super().requires_grad_(False)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_cast(fn)
        kept = {name: self._buffers.pop(name) for name in self.stay_on_cpu if name in self._buffers}
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers.update(kept)
            mark_codes(self)

    # State dicts

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        names = self.checkpoint_names
        for attribute in ("weight", "bias", *self.packed_attributes()):
            tensor = {**self._buffers, **self._parameters}.get(attribute)
            if tensor is not None:
                destination[prefix + names.get(attribute, attribute)] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Packed tensors, checked before any is put in place; or a floating-point weight, which is quantized."""
        names = {name: prefix + self.checkpoint_names.get(name, name) for name in ("bias", *self.packed_attributes())}
        known = set(names.values())
        if strict:
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]
        found = {name: state_dict[key].detach() for name, key in names.items() if key in state_dict}
        bias = found.pop("bias", None)
        if self.bias is not None:
            if bias is None:
                missing_keys.append(names["bias"])
            elif bias.shape != self.bias.shape:
                error_msgs.append(f"{names['bias']}: shape {tuple(bias.shape)}, not {tuple(self.bias.shape)}")
            else:
                with torch.no_grad():
                    self.bias.copy_(bias)
        elif bias is not None and strict:
            unexpected_keys.append(names["bias"])
        try:
            parts = self._parts_of(found, names, missing_keys)
            device = self._device()
        except QuantizationError as error:
            error_msgs.append(f"{prefix[:-1]}: {error}")
            return
        if parts is not None:
            self.fill({n: part.to("cpu" if n in self.stay_on_cpu else device) for n, part in parts.items()})

    def _parts_of(
        self, found: dict[str, Tensor], names: dict[str, str], missing_keys: list[str]
    ) -> dict[str, Tensor] | None:
        recipe = self.load_recipe("weight") if list(found) == ["weight"] else None
        if recipe is not None and found["weight"].is_floating_point() and found["weight"].shape == recipe.shape:
            return recipe.run(found["weight"].to(self._device(), recipe.dtype).contiguous())
        absent = [names[name] for name in self.packed_attributes() if name not in found]
        if absent:
            missing_keys += absent
            return None
        for name, part in found.items():
            held: Tensor = getattr(self, name)
            fits = part.shape == held.shape or self.accepts(name, tuple(part.shape), part.dtype)
            if part.dtype != held.dtype or not fits:
                raise QuantizationError(
                    f"{name} is {part.dtype} of shape {tuple(part.shape)}, not {held.dtype} of {tuple(held.shape)}"
                )
        self.check_parts({n: part if n in self.read_first else part.to("meta") for n, part in found.items()})
        return {name: part.clone() for name, part in found.items()}

    def _device(self) -> torch.device:
        device = next(getattr(self, name) for name in self.packed_attributes() if name not in self.stay_on_cpu).device
        if device.type == "meta":
            raise QuantizationError("the layer is on meta; load it with from_pretrained, or build it on a device")
        return device


_NO_TRAINING = (
    "quantized weights cannot be trained: they are codes, which have no gradient. Add adapters to train (LoRA), "
    "or dequantize() the model first"
)


def refuse_cast(fn: Callable[[Tensor], Tensor]) -> None:
    """QuantizationError if ``fn``, which nn.Module would apply to every tensor, changes floating-point dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        found = fn(torch.empty(0, dtype=dtype, device="cpu")).dtype
        if found != dtype:
            raise QuantizationError(
                f"a quantized model cannot be cast to {str(found).removeprefix('torch.')}: its packed weights are "
                "codes, not numbers. Load it with dtype= for the other weights, or dequantize() it first; "
                "moving it to a device is fine"
            )


def refuse_training() -> None:
    """Raise the QuantizationError for whoever asks quantized weights for gradients."""
    raise QuantizationError(_NO_TRAINING)


def holds_in_out(module: nn.Module) -> bool:
    """Whether a linear layer's weight is stored (in_features, out_features), which its class says."""
    return bool(getattr(type(module), "weight_is_in_out", False))
