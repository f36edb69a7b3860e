"""int4 and int8 weights on a GPU: torch's own product against decoding, and moves between devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loadstone.quant.int4_layout import join, layout_for
from loadstone.quant.weight_only import Int4WeightOnlyLinear, Int8WeightOnlyLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BOTH = [(Int8WeightOnlyLinear, {}), (Int4WeightOnlyLinear, {"group_size": 64})]


def layer_of(kind: Any, options: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return kind.from_linear(nn.Linear(512, 256, dtype=dtype).to(device), **options)


@pytest.mark.skipif(torch.version.hip is not None, reason="torch has no int4 product there")
def test_the_layout_is_learnt() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("torch's int4 product needs compute capability 8.0")
    layout = layout_for(device, 256, 512)
    assert layout is not None
    codes = torch.randint(0, 16, (256, 512), device=device).to(torch.uint8)
    assert torch.equal(layout.codes(layout.packed(join(codes))), codes)
    assert layer_of(Int4WeightOnlyLinear, {"group_size": 64}, "cuda", torch.bfloat16).tiled


@pytest.mark.parametrize(("kind", "options"), BOTH, ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16, 256, 257])
def test_forward_and_backward(kind: Any, options: dict[str, Any], dtype: torch.dtype, rows: int) -> None:
    layer = layer_of(kind, options, "cuda", dtype)
    x = torch.randn(rows, 512, device="cuda", dtype=dtype, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    weight, bias = layer.dequantized_weight(torch.float32).double(), layer.bias.detach().double()
    room = 4 * torch.finfo(dtype).eps
    size = x.detach().double().abs() @ weight.abs().t() + bias.abs()
    assert bool(((out.double() - x.double() @ weight.t() - bias).abs() <= room * size).all())
    assert x.grad is not None
    assert bool(((x.grad.double() - weight.sum(0)).abs() <= room * weight.abs().sum(0) + 1e-9).all())


@pytest.mark.parametrize(("kind", "options"), BOTH, ids=["int8", "int4"])
def test_codes_survive_a_move_there_and_back(kind: Any, options: dict[str, Any]) -> None:
    layer = layer_of(kind, options, "cpu", torch.bfloat16)
    weight, state = layer.dequantized_weight(), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.to("cuda")
    assert torch.equal(layer.dequantized_weight().cpu(), weight)
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in layer.state_dict().items())
    layer.to("cpu")
    assert torch.equal(layer.dequantized_weight(), weight)
