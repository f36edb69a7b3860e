"""Weights on their way to an accelerator: fetched by a thread of their own, so that the next come while some are used.

On CUDA they travel on a side stream: from pinned memory directly, from mapped files through two pinned buffers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .disk import give_back

BUFFER = 32 << 20
"""Bytes of a pinned buffer; there are two."""


class Parcel(NamedTuple):
    """A weight to bring: the tensor that stays, the dtype in which it is used, and whether a file holds it."""

    home: Tensor
    dtype: torch.dtype
    on_disk: bool

    @property
    def version(self) -> int | None:
        """Changes when the tensor is written to."""
        return None if self.home.is_inference() else self.home._version


class Delivery(NamedTuple):
    """Tensors there, in the order of the parcels, and the event after which a stream may use them."""

    tensors: list[Tensor]
    event: Any = None


class Courier:
    """Brings weights to one device. ``ahead``: whether the next may be fetched before they are needed."""

    def __init__(self, device: torch.device, ahead: bool = True) -> None:
        self.device, self.ahead = device, ahead
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: tuple[object, list[tuple[Parcel, int | None]], Future[Delivery]] | None = None
        self._buffers: list[Tensor] = []
        self._taken: list[Any] = []
        self._stream: Any = None
        self._departure: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device, "ahead": self.ahead}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["device"], state["ahead"])  # type: ignore[misc]

    def bring(self, owner: object, parcels: Sequence[Parcel]) -> list[Tensor]:
        """The parcels' tensors on the device: those fetched ahead for ``owner`` if they are still what they were."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            whose, sent, future = waiting
            now = [(parcel, parcel.version) for parcel in parcels]
            if whose is owner and len(sent) == len(now) and all(map(_same, sent, now)):
                return self._receive(future.result())
            future.cancel()
        return self._receive(self._do(parcels).result())

    def fetch_ahead(self, owner: object, parcels: Sequence[Parcel]) -> None:
        """Begin to bring what ``owner`` will need next."""
        if self.ahead and parcels:
            self._waiting = (owner, [(parcel, parcel.version) for parcel in parcels], self._do(parcels))

    def departed(self) -> None:
        """Who was brought last has been used: all that will use it is in the queue of the device.

        The host runs ahead of the device; without this the next ones would be brought, and held, long before.
        """
        if self.device.type == "cuda":
            self._departure = torch.cuda.Event()
            self._departure.record(torch.cuda.current_stream(self.device))

    def drop(self) -> None:
        """Forget what was fetched ahead."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting[2].cancel()

    def _do(self, parcels: Sequence[Parcel]) -> Future[Delivery]:
        if self._process != os.getpid():
            self._forget()  # a fork has no threads
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="loadstone-offload")
        return self._thread.submit(self._fetch, list(parcels), self._departure)

    def _receive(self, delivery: Delivery) -> list[Tensor]:
        if delivery.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(delivery.event)
            for tensor in delivery.tensors:
                tensor.record_stream(stream)
        return delivery.tensors

    @torch.no_grad()
    def _fetch(self, parcels: Sequence[Parcel], departure: Any = None) -> Delivery:
        """In the courier's thread, once who was to leave before has left."""
        if self.device.type == "cuda":
            if departure is not None:
                departure.synchronize()
            delivery = self._fetch_cuda(parcels)
        else:
            delivery = Delivery([parcel.home.detach().to(self.device).to(parcel.dtype) for parcel in parcels])
        give_back(parcel.home for parcel in parcels if parcel.on_disk)
        return delivery

    def _fetch_cuda(self, parcels: Sequence[Parcel]) -> Delivery:
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            tensors = []
            with torch.cuda.stream(self._stream):
                for parcel in parcels:
                    home = parcel.home.detach()
                    there = torch.empty(home.shape, dtype=home.dtype, device=self.device)
                    if home.is_pinned() or not home.is_contiguous() or home.device.type != "cpu":
                        there.copy_(home, non_blocking=True)
                    else:
                        self._stage(home, there)
                    tensors.append(there if there.dtype == parcel.dtype else there.to(parcel.dtype))
                event = torch.cuda.Event()
                event.record(self._stream)
        return Delivery(tensors, event)

    def _stage(self, home: Tensor, there: Tensor) -> None:
        """Copy pageable memory through the pinned buffers: one is filled while the device reads the other."""
        source, target = home.reshape(-1).view(torch.uint8), there.view(-1).view(torch.uint8)
        if not self._buffers:
            self._buffers = [torch.empty(BUFFER, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._taken = [None, None]
        for begin in range(0, source.numel(), BUFFER):
            part = source[begin : begin + BUFFER]
            self._buffers.reverse()
            self._taken.reverse()
            if self._taken[0] is not None:
                self._taken[0].synchronize()
            buffer = self._buffers[0][: part.numel()]
            buffer.copy_(part)
            target[begin : begin + part.numel()].copy_(buffer, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
            self._taken[0] = event


def _same(sent: tuple[Parcel, int | None], now: tuple[Parcel, int | None]) -> bool:
    return sent[0].home is now[0].home and sent[0].dtype == now[0].dtype and sent[1] == now[1]
