"""torch's `PipelineStage` of a model that `from_pretrained` has loaded onto a mesh with a "pp" dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from .. import kernels
from ..errors import ParallelError
from .head import fused_loss, why_not_fused

if TYPE_CHECKING:
    from .causal_lm import CausalLM


class Stage(PipelineStage):
    """This rank's stage, for torch's schedules of one stage a rank (``ScheduleGPipe``, ``Schedule1F1B``).

    ``loss`` is their ``loss_fn``. If the head is tied to the embedding, the first and the last stage have each a copy
    of the weight; its gradients are summed over both at the end of every step of a schedule, so that the copies stay
    equal under any optimizer that does the same to both.
    """

    def __init__(self, model: CausalLM, skip_logits: bool = True) -> None:
        layout = model.layout
        if layout is None or layout.pp is None:
            raise ParallelError(
                "only a model loaded with a device_mesh that has a 'pp' dimension is a pipeline's stage"
            )
        group = layout.pp.get_group()
        super().__init__(model, layout.stage, layout.stages, layout.device, group=group)
        model.stage_skips_logits = skip_logits and why_not_fused(model.lm_head) is None
        self._model, self._group = model, group
        self._before: Tensor | None = None
        self._unsummed = False
        self._other = -1
        if layout.shared is not None and (self.is_first or self.is_last):
            self._other = dist.get_global_rank(group, layout.stages - 1 - layout.stage)

    def loss(self, output: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """The mean loss of one microbatch, from what the last stage gives.

        labels: (batch, seq), int64, -100 = ignored; shifted inside. options: ``num_items_in_batch`` (pass
        ``scale_grads=False`` to the schedule then: it is a share of a sum), ``ignore_index``.
        """
        model = self._model
        if model.training and model.stage_skips_logits:
            return fused_loss(model.lm_head, output, labels, kernels=model.kernels, **options)
        return kernels.causal_lm_loss(output, labels, kernels=model.kernels, **options)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over the parameters of all stages, each of which has to call it; the norm
        before."""
        held = [parameter for parameter in self.submod.parameters() if parameter.grad is not None]
        copy = self._shared() if self.is_last and not self.is_first else None
        norm = nn.utils.get_total_norm([one.grad for one in held if one is not copy])  # type: ignore[misc]
        norm = getattr(norm, "full_tensor", lambda: norm)().to(self.device)
        total = norm.square()
        dist.all_reduce(total, group=self._group)
        total = total.sqrt()
        nn.utils.clip_grads_with_norm_(held, max_norm, total)
        return total

    def clear_runtime_states(self) -> None:
        """Before a step: what gradients have been summed already is put aside."""
        super().clear_runtime_states()
        self._unsummed = self.has_backward
        if self._unsummed and (shared := self._shared()) is not None:
            self._before, shared.grad = shared.grad, None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """After the last backward of a step, in newer versions of torch, which leave `scale_grads` out for a factor of
        1."""
        super().perform_reduce_grad(1)
        self.scale_grads(grad_scale_factor)

    def scale_grads(self, grad_scale_factor: int) -> None:
        """After the last backward of a step, once gradients are reduced."""
        if self._unsummed and (shared := self._shared()) is not None:
            self._sum(shared)
        self._unsummed = False
        super().scale_grads(grad_scale_factor)

    def _shared(self) -> nn.Parameter | None:
        if self._other < 0:
            return None
        parameter = self.submod.get_parameter(self._model.layout.shared)
        return parameter if parameter.requires_grad else None

    def _sum(self, parameter: nn.Parameter) -> None:
        """Add the other copy's gradient; a sum of two is the same on both, bit for bit."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        mine: Any = parameter.grad
        mine = mine.to_local() if hasattr(mine, "to_local") else mine
        sent, other = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, self._other, self._group),
                dist.P2POp(dist.irecv, other, self._other, self._group),
            ]
        )
        for work in works:
            work.wait()
        mine.add_(other)
        if self._before is not None:
            parameter.grad.add_(self._before)
            self._before = None
