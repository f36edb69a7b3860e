"""Weights that live on the CPU or in their files and visit the device on which they are used, block by block.

A visiting module's parameters *are* its tensors at home: what reads the model (state_dict, saving, counting) sees the
weights themselves. Only while its forward runs do copies on the device stand in their place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .courier import Courier, Parcel
from .disk import ask_for, give_back
from .placement import ON_DISK


class Seat(NamedTuple):
    """Where a visiting tensor sits: a module's table of parameters or buffers."""

    table: dict[str, Any]
    name: str
    home: Tensor
    dtype: torch.dtype
    on_disk: bool


class Guest:
    """What visits ``device`` while ``host`` runs: the tensors of ``modules``, with all that is in them if ``deep``.

    Tensors that are on the device already stay as they are, so what is added to the modules later (adapters) may live
    anywhere. Frozen tensors are copied without autograd, and backward copies them again instead of keeping them.
    On the CPU, pages of what stays in files are given back when they leave, of ``readers`` too.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        courier: Courier | None = None,
        *,
        deep: bool = True,
        readers: Sequence[nn.Module] = (),
    ) -> None:
        self.modules, self.device, self.courier, self.deep = list(modules), device, courier, deep
        self.readers = list(readers)
        self.before: Guest | None = None
        self.after: Guest | None = None
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._inside = 0
        self._swapped: list[tuple[Seat, Tensor]] = []
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("modules", "device", "courier", "deep", "readers", "before", "after")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def attach(self, host: nn.Module) -> None:
        """Hang the hooks on the module whose forward needs the tensors."""
        host.register_forward_pre_hook(self.enter)
        host.register_forward_hook(self.leave, always_call=True)

    def enter(self, _module: nn.Module, _args: Any) -> None:
        """A forward pre-hook: bring what is not on the device."""
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                try:
                    self._bring()
                except BaseException:  # no memory there, an interrupt: as if nobody had come
                    self._inside = 0
                    self._send_home()
                    raise
        self._local.__dict__.setdefault("pushed", []).append(self._save_homes())

    def leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """A forward hook, called also if the forward raised: everybody goes home."""
        pushed = self._local.__dict__.get("pushed")
        if not pushed:
            return  # an earlier hook raised, we never came
        if pushed.pop():
            torch._C._autograd._pop_saved_tensors_default_hooks()
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._send_home()
                if output is None and self.courier is not None:
                    self.courier.drop()

    def seats(self) -> Iterator[Seat]:
        """What has to be brought now."""
        for owner in self._owners():
            on_disk = vars(owner).get(ON_DISK, {})
            stays = getattr(type(owner), "stay_on_cpu", ())
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    if tensor is None or tensor.is_meta or name in stays:
                        continue
                    dtype = on_disk.get(name, tensor.dtype)
                    if tensor.device != self.device or tensor.dtype != dtype:
                        yield Seat(table, name, tensor, dtype, name in on_disk)

    def _owners(self) -> Iterator[nn.Module]:
        for module in self.modules:
            if self.deep:
                yield from module.modules()
            else:
                yield module

    def _bring(self) -> None:
        if self.device.type == "cpu" and self.after is not None:
            ask_for(self._on_disk(self.after._owners()))
        seats = list(self.seats())
        frozen = [seat for seat in seats if not seat.home.requires_grad]
        arrived = dict(zip(map(_key, frozen), self._copies(frozen), strict=True)) if frozen else {}
        for seat in seats:
            if seat.home.requires_grad:  # adapters that were put beside the weights: autograd follows the copy
                arrived[_key(seat)] = seat.home.to(self.device).to(seat.dtype)
        for seat in seats:
            seat.table[seat.name] = arrived[_key(seat)]
            self._swapped.append((seat, arrived[_key(seat)]))
        if self.courier is not None:
            # In a backward pass blocks are run again (gradient checkpointing), from the last to the first.
            backwards = torch._C._current_graph_task_id() != -1
            following = self.before if backwards else self.after
            if following is not None and following is not self:
                self.courier.fetch_ahead(following, following.parcels())

    def parcels(self) -> list[Parcel]:
        """What `bring` will ask for when its turn comes."""
        return _parcels([seat for seat in self.seats() if not seat.home.requires_grad])

    def _copies(self, seats: Sequence[Seat]) -> list[Tensor]:
        parcels = _parcels(seats)
        if self.courier is not None:
            found = self.courier.bring(self, parcels)
        else:
            with torch.no_grad():
                found = [parcel.home.detach().to(self.device).to(parcel.dtype) for parcel in parcels]
        by_home = {(id(parcel.home), parcel.dtype): copy for parcel, copy in zip(parcels, found, strict=True)}
        return [by_home[_key(seat)] for seat in seats]

    def _send_home(self) -> None:
        for seat, copy in self._swapped:
            if seat.table.get(seat.name) is copy:  # else somebody replaced it meanwhile
                seat.table[seat.name] = seat.home
        came = bool(self._swapped)
        self._swapped.clear()
        if came and self.courier is not None:
            self.courier.departed()
        if self.device.type == "cpu":
            owners = (*self._owners(), *self.readers)
            give_back(tensor for tensor in self._on_disk(owners) if not tensor.requires_grad)

    @staticmethod
    def _on_disk(owners: Iterable[nn.Module]) -> Iterator[Tensor]:
        for owner in owners:
            for name in vars(owner).get(ON_DISK, ()):
                tensor = owner._parameters.get(name, owner._buffers.get(name))
                if tensor is not None and tensor.device.type == "cpu" and tensor.is_contiguous():
                    yield tensor

    def _save_homes(self) -> bool:
        """Let autograd remember a frozen visitor's home instead of the copy; whether that was set up.

        Not where somebody else takes care of what autograd saves, as gradient checkpointing does.
        """
        if not torch.is_grad_enabled() or not self._swapped:
            return False
        top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
        if top is None or top(False) is not None:
            return False
        homes = {
            copy.untyped_storage()._cdata: seat
            for seat, copy in self._swapped
            if not seat.home.requires_grad and seat.home.is_contiguous()
        }
        if not homes:
            return False
        device = self.device

        def pack(tensor: Tensor) -> Any:
            if tensor.layout != torch.strided:
                return tensor
            seat = homes.get(tensor.untyped_storage()._cdata)
            if seat is None:
                return tensor
            return seat, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            seat, dtype, size, stride, offset = saved
            copy = seat.home.detach().to(device).to(seat.dtype)
            if seat.on_disk:
                give_back([seat.home])
            view = copy if copy.dtype == dtype else copy.view(-1).view(dtype)
            return torch.as_strided(view, size, stride, offset)

        torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
        return True


def _key(seat: Seat) -> tuple[int, torch.dtype]:
    return id(seat.home), seat.dtype


def _parcels(seats: Sequence[Seat]) -> list[Parcel]:
    """One for each tensor, however many seats it has."""
    return [Parcel(seat.home, seat.dtype, seat.on_disk) for seat in {_key(seat): seat for seat in seats}.values()]


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weights of a model visit the device on which they are used."""
    return any(
        isinstance(getattr(hook, "__self__", None), Guest)
        for module in model.modules()
        for hook in module._forward_hooks.values()
    )


def in_a_row(guests: Sequence[Guest]) -> None:
    """Tell each guest who comes before and after it, so that the next can be fetched ahead."""
    for one, other in pairwise(guests):
        one.after, other.before = other, one
