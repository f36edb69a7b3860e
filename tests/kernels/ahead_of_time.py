"""Compile the kernels that real calls launch, for GPUs that are not at hand, and say what the compiler made of them.

    python tests/kernels/ahead_of_time.py sm_90 [family ...]

prints a JSON list with an entry for each kernel. Run it in a process of its own, without TRITON_INTERPRET: a kernel
defined under the interpreter cannot be compiled. A family of kernels is added by a row of `FAMILIES`; its calls go to
the implementation (`loadstone.kernels.fused`), not the public function, with CPU tensors of realistic shapes, which
nothing reads or writes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BF16, FP32 = torch.bfloat16, torch.float32
NVIDIA = {"sm_80": 80, "sm_86": 86, "sm_90": 90}
TARGETS = (*NVIDIA, "gfx942")
OWN_TABLES = ("sm_80", "sm_90", "gfx942")  # for kernels that need no shared memory to speak of, sm_86 is sm_80
MATRIX = {"sm_80": "mma.sync", "sm_86": "mma.sync", "sm_90": "wgmma.mma_async", "gfx942": "v_mfma"}

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
_DIVISIBLE = ["tt.divisibility", 16]


@dataclass(frozen=True)
class Family:
    """Kernels compiled together.

    calls: makes the calls, forward and backward, for a dtype. matrix: kernels, by name, that must use the chip's matrix
    instruction for two-byte dtypes. spills: bytes of spilled registers that are tolerated, for what is no common case.
    """

    calls: Callable[[torch.dtype], None]
    dtypes: tuple[torch.dtype, ...] = (BF16, FP32)
    targets: tuple[str, ...] = TARGETS
    matrix: tuple[str, ...] = ()
    spills: int = 0


def empty(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """A tensor for a call that will not run."""
    return torch.empty(shape, dtype=dtype, requires_grad=grad and dtype.is_floating_point)


def backward(outputs: Tensor | tuple[Tensor, ...]) -> None:
    """The backward pass of a call, for incoming gradients like the outputs."""
    real = [outputs] if isinstance(outputs, Tensor) else [tensor for tensor in outputs if tensor.requires_grad]
    torch.autograd.backward(real, [torch.empty_like(tensor) for tensor in real])


def _norm(dtype: torch.dtype) -> None:
    from loadstone.kernels.fused import norm

    for hidden_size in (576, 8192, 20480):
        x, residual = (empty(2, 100, hidden_size, dtype=dtype) for _ in range(2))
        weight, bias = (empty(hidden_size, dtype=dtype) for _ in range(2))
        if hidden_size <= 8192:
            backward(norm.add_rms_norm(x, residual, weight, 1e-5))
        if hidden_size >= 8192:
            backward(norm.add_layer_norm(x, residual, weight, bias, 1e-5))


def _rotary(dtype: torch.dtype) -> None:
    from loadstone.kernels.fused import rotary

    for kv_heads in (8, 1):
        query = empty(2, 100, 32, 128, dtype=dtype).transpose(1, 2)
        key = empty(2, 100, kv_heads, 128, dtype=dtype).transpose(1, 2)
        cos, sin = (empty(1, 1, 100, 128, dtype=dtype, grad=False) for _ in range(2))
        backward(rotary.apply_rotary(query, key, cos, sin))


def _gate(dtype: torch.dtype) -> None:
    from loadstone.kernels.fused import gate

    for name in ("silu", "gelu_pytorch_tanh"):
        backward(gate.gated(empty(2, 100, 14336, dtype=dtype), empty(2, 100, 14336, dtype=dtype), name))


def _loss(dtype: torch.dtype) -> None:
    from loadstone.kernels.fused import cross_entropy

    targets = torch.zeros(8, dtype=torch.int64)
    for vocabulary, options in ((128256, (0.0, None)), (50257, (0.1, 30.0))):
        states, weight = empty(8, 16, dtype=dtype), empty(vocabulary, 16, dtype=dtype)
        backward(cross_entropy.linear_cross_entropy(states, weight, targets, -100, *options)[0])
        backward(cross_entropy.cross_entropy(empty(8, vocabulary, dtype=dtype), targets, -100, *options)[0])


FAMILIES: dict[str, Family] = {
    "norm": Family(_norm, dtypes=(BF16,), targets=OWN_TABLES),
    "rotary": Family(_rotary, dtypes=(BF16,), targets=OWN_TABLES),
    "gate": Family(_gate, dtypes=(BF16,), targets=OWN_TABLES),
    "loss": Family(_loss, dtypes=(BF16,), targets=OWN_TABLES),
}


def specialised(kernel: Any, values: dict[str, Any], target: str) -> tuple[dict[str, str], dict[str, Any], dict]:
    """Signature, constants and attributes of a kernel for arguments, as Triton's JIT specialises them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        free = not parameter.do_not_specialize
        aligned = free and not parameter.do_not_specialize_on_alignment
        kind, facts = "constexpr", []
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            kind = "*" + _TYPES[value.dtype]
            if aligned and value.data_ptr() % 16 == 0:
                facts.append(_DIVISIBLE)
            if free and target == "gfx942" and value.untyped_storage().nbytes() < 1 << 31:
                facts.append(["tt.pointer_range", 32])
        elif isinstance(value, bool):
            kind = "u1"
        elif isinstance(value, int):
            kind = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if aligned and value % 16 == 0:
                facts.append(_DIVISIBLE)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            raise TypeError(f"{kernel.__name__} is given {parameter.name}={value!r}, which no kernel takes")
        signature[parameter.name] = kind if kind == "constexpr" else parameter.annotation_type or kind
        if facts:
            attributes[(place,)] = facts
    return signature, constants, attributes


def launches(family: Family, dtype: torch.dtype, target: str) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(kernel, its arguments by name, options of the compiler) of a family's calls on a target, each once."""
    from loadstone.kernels.fused.launch import watched
    from loadstone.kernels.tuning import as_generation

    seen: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def watcher(kernel: Any, _: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, arguments, strict=False))
        values.update((name, value) for name, value in options.items() if name in names)
        seen.append((kernel, values, {name: value for name, value in options.items() if name not in names}))

    with as_generation(target), watched(watcher):
        family.calls(dtype)
    known = set()
    for kernel, values, options in seen:
        key = repr((kernel.__name__, specialised(kernel, values, target), options))
        if key not in known:
            known.add(key)
            yield kernel, values, options


def compiled(kernel: Any, values: dict[str, Any], options: dict[str, Any], target: str) -> dict[str, Any]:
    """What came of compiling one kernel: see `_nvidia_resources` and `_amd_resources`, shared memory in bytes and how
    many of the chip's matrix instructions there are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(kernel, values, target)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("cuda", NVIDIA[target], 32) if target in NVIDIA else GPUTarget("hip", target, 64)
    binary = triton.compile(source, target=gpu, options=options)
    text = binary.asm["ptx" if target in NVIDIA else "amdgcn"]
    resources = _nvidia_resources(binary.asm["cubin"]) if target in NVIDIA else _amd_resources(text)
    return {
        "kernel": kernel.__name__.strip("_"),
        "target": target,
        "types": sorted({kind for kind in signature.values() if kind.startswith("*")}),
        "constants": {name: value for name, value in constants.items() if value is not None},
        "options": options,
        "shared": binary.metadata.shared,
        "matrix": text.count(MATRIX[target]),
        **resources,
    }


def _nvidia_resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of local memory of a thread: nothing but spilled registers lies there."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {"registers": _number(r"REG:(\d+)", found), "spills": _number(r"STACK:(\d+)", found)}


def _amd_resources(assembly: str) -> dict[str, int]:
    """Vector registers, and how many registers were spilled."""
    registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
    return {"registers": registers, "spills": _number(r"\.vgpr_spill_count:\s*(\d+)", assembly)}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the compiler said:\n{text[:2000]}")
    return int(found.group(1))


def report(target: str, names: list[str]) -> list[dict[str, Any]]:
    """An entry for each kernel of the families ``names`` (all, if empty) on a target."""
    entries = []
    for name in names or FAMILIES:
        family = FAMILIES[name]
        for dtype in family.dtypes if target in family.targets else ():
            for kernel, values, options in launches(family, dtype, target):
                entry = compiled(kernel, values, options, target)
                wanted = entry["kernel"] in family.matrix and dtype.itemsize == 2
                about = {"family": name, "dtype": str(dtype).removeprefix("torch."), "tolerated": family.spills}
                entries.append({**about, **entry, "wanted": wanted})
    return entries


def _flash(dtype: torch.dtype, head_dim: int, *, bounded: bool = False, **options: float) -> None:
    """Forward, backward and decode of flash attention: 32 heads sharing 8, 4096 positions."""
    from loadstone.kernels.fused import flash
    from loadstone.kernels.visibility import Visibility

    query, key, value = (empty(2, heads, 4096, head_dim, dtype=dtype) for heads in (32, 8, 8))
    seen = Visibility(causal=True)
    if bounded:
        bound, keep = torch.empty(2, 4096, dtype=torch.int32), torch.empty(2, 4096, dtype=torch.uint8)
        seen = Visibility(0, True, 1024, bound, bound, keep, torch.empty(2, dtype=torch.int32))
    dropout = options.get("dropout", 0.0)
    seed = torch.empty(1, dtype=torch.int64) if dropout else None
    backward(flash.flash_attention(query, key, value, seen, seed, 0.1, options.get("softcap", 0.0), dropout))
    with torch.no_grad():
        flash.flash_attention(query[:, :, :1], key, value, seen, None, 0.1, options.get("softcap", 0.0), 0.0)


_FLASH = ("forward", "backward_queries", "backward_keys")
FAMILIES["flash"] = Family(lambda dtype: _flash(dtype, 128), (BF16,), matrix=_FLASH)
FAMILIES["flash, narrow"] = Family(lambda dtype: _flash(dtype, 64), matrix=_FLASH)
FAMILIES["flash, wide"] = Family(lambda dtype: _flash(dtype, 256), (BF16,), ("sm_80", "sm_90", "gfx942"))
FAMILIES["flash, bounded"] = Family(
    lambda dtype: _flash(dtype, 128, bounded=True), (BF16,), ("sm_80", "sm_90", "gfx942"), _FLASH
)
FAMILIES["flash, softcap"] = Family(lambda dtype: _flash(dtype, 128, softcap=30.0), (BF16,), ("sm_90",), _FLASH)
FAMILIES["flash, dropout"] = Family(lambda dtype: _flash(dtype, 64, dropout=0.1), (BF16,), ("sm_90",), _FLASH, 64)


def _four_bit(dtype: torch.dtype) -> None:
    """A 4-bit weight decoded, and multiplied with one row and with as many as one product takes."""
    from loadstone.kernels.fused import four_bit, scales

    table, nested = torch.empty(256, dtype=FP32), torch.empty(3584, dtype=FP32)
    scales.dequantize_absmax(torch.empty(917504, dtype=torch.uint8), nested, table, 0.5, 256)
    for shape in ([4096, 14336], [1024, 4096]):
        count = shape[0] * shape[1]
        packed, code = torch.empty(count // 2, dtype=torch.uint8), torch.empty(16, dtype=FP32)
        absmax, bias = torch.empty(count // 64, dtype=FP32), empty(shape[0], dtype=dtype)
        for rows in (1, four_bit.MOST_ROWS):
            backward(four_bit.linear_4bit(empty(rows, shape[1], dtype=dtype), packed, absmax, code, 64, shape, bias))


def _eight_bit(dtype: torch.dtype) -> None:
    from loadstone.kernels.fused import eight_bit

    weight, scb = torch.empty(4096, 14336, dtype=torch.int8), torch.empty(4096, dtype=FP32)
    for rows in (1, 512):
        x = torch.zeros(rows, 14336, dtype=dtype)
        eight_bit.linear_int8(x, weight, scb, None, 6.0)


FAMILIES["four bit"] = Family(_four_bit, matrix=("multiply_4bit",))
FAMILIES["eight bit"] = Family(_eight_bit, (BF16,))


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1], sys.argv[2:]), default=str))
