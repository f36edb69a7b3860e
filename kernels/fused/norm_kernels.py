"""The kernels of the norms, one pair for RMSNorm and LayerNorm, with and without the residual add.

Statistics are in fp32. A row that fits in a block is read once and stays in registers (WHOLE); a longer one is read a
block at a time, twice. Nothing is added atomically: the same input gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _loaded(X, Residual, row, columns, real, stride_x, stride_r, KEPT: tl.constexpr):
    """x, or x + residual rounded to the dtype it is kept in, as fp32; 0 where not ``real``."""
    x = tl.load(X + row * stride_x + columns, mask=real, other=0.0).to(tl.float32)
    if Residual is not None:
        x += tl.load(Residual + row * stride_r + columns, mask=real, other=0.0).to(tl.float32)
        x = x.to(KEPT).to(tl.float32)
    return x


@triton.jit
def _store_normed(Out, Weight, Bias, normed, row, columns, real, hidden_size, KEPT: tl.constexpr, CENTER: tl.constexpr):
    """Times the weight, plus the bias. RMSNorm rounds before it multiplies, LayerNorm once at the end."""
    weight = tl.load(Weight + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)
    if not CENTER:
        normed = normed.to(KEPT).to(tl.float32)
    out = normed * weight
    if Bias is not None:
        out += tl.load(Bias + columns, mask=columns < hidden_size, other=0.0).to(tl.float32)
    tl.store(Out + row * hidden_size + columns, out.to(Out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    X, Residual, Weight, Bias, Out, Total, Mean, Rstd, stride_x, stride_r, rows, hidden_size, eps,
    KEPT: tl.constexpr, CENTER: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    there = row < rows
    columns = tl.arange(0, BLOCK_H)[None, :]
    mean = tl.zeros([BLOCK_R, 1], tl.float32)
    if WHOLE:
        real = there & (columns < hidden_size)
        x = _loaded(X, Residual, row, columns, real, stride_x, stride_r, KEPT)
        if Residual is not None:
            tl.store(Total + row * hidden_size + columns, x.to(KEPT), mask=real)
        if CENTER:
            mean = tl.sum(x, 1, keep_dims=True) / hidden_size
            x = tl.where(real, x - mean, 0.0)
        squares = tl.sum(x * x, 1, keep_dims=True)
        rstd = tl.rsqrt(squares / hidden_size + eps)
        _store_normed(Out, Weight, Bias, x * rstd, row, columns, real, hidden_size, KEPT, CENTER)
    else:
        squares = tl.zeros([BLOCK_R, 1], tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            place = start + columns
            real = there & (place < hidden_size)
            x = _loaded(X, Residual, row, place, real, stride_x, stride_r, KEPT)
            if Residual is not None:
                tl.store(Total + row * hidden_size + place, x.to(KEPT), mask=real)
            if CENTER:  # Chan et al. 1979: the mean and the squares around it, of what was seen and this block
                count = tl.minimum(hidden_size - start, BLOCK_H).to(tl.float32)
                seen = count + start
                own = tl.sum(x, 1, keep_dims=True) / count
                x = tl.where(real, x - own, 0.0)
                apart = own - mean
                mean += apart * (count / seen)
                squares += apart * apart * (count * (start / seen))
            squares += tl.sum(x * x, 1, keep_dims=True)
        rstd = tl.rsqrt(squares / hidden_size + eps)
        for start in range(0, hidden_size, BLOCK_H):
            place = start + columns
            real = there & (place < hidden_size)
            x = _loaded(X, Residual, row, place, real, stride_x, stride_r, KEPT)
            _store_normed(Out, Weight, Bias, (x - mean) * rstd, row, place, real, hidden_size, KEPT, CENTER)
    tl.store(Rstd + row, rstd, mask=there)
    if CENTER:
        tl.store(Mean + row, mean, mask=there)


@triton.jit
def _gradient_in(Grad, X, row, columns, real, stride_g, stride_x, mean, rstd):
    """The incoming gradient and the normalised input, fp32."""
    grad = tl.load(Grad + row * stride_g + columns, mask=real, other=0.0).to(tl.float32)
    x = tl.load(X + row * stride_x + columns, mask=real, other=0.0).to(tl.float32)
    return grad, (x - mean) * rstd


@triton.jit
def _store_gradient(GradX, GradTotal, grad, row, columns, real, stride_t, hidden_size):
    """The gradient of the norm, plus what flows into the sum from elsewhere."""
    if GradTotal is not None:
        grad += tl.load(GradTotal + row * stride_t + columns, mask=real, other=0.0).to(tl.float32)
    tl.store(GradX + row * hidden_size + columns, grad.to(GradX.dtype.element_ty), mask=real)


@triton.jit
def _statistics(Mean, Rstd, row, there, CENTER: tl.constexpr):
    rstd = tl.load(Rstd + row, mask=there, other=0.0)
    if CENTER:
        mean = tl.load(Mean + row, mask=there, other=0.0)
    else:
        mean = rstd * 0.0
    return mean, rstd


@triton.jit(do_not_specialize=["rows", "blocks_each"])
def norm_backward(
    Grad, GradTotal, X, Weight, Mean, Rstd, GradX, WeightParts, BiasParts,
    stride_g, stride_t, stride_x, rows, hidden_size, blocks_each,
    CENTER: tl.constexpr, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradient of the input, and of a row that fits in a block the program's share of those of weight and bias."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_H)[None, :]
    if WHOLE:
        inside = columns < hidden_size
        weight = tl.load(Weight + columns, mask=inside, other=0.0).to(tl.float32)
        of_weight = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        of_bias = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for block in range(blocks_each):
        row = ((program * blocks_each + block) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        there = row < rows
        mean, rstd = _statistics(Mean, Rstd, row, there, CENTER)
        if WHOLE:
            real = there & inside
            grad, normed = _gradient_in(Grad, X, row, columns, real, stride_g, stride_x, mean, rstd)
            if WeightParts is not None:
                if CENTER:
                    of_weight += grad * normed
                else:
                    of_weight += grad * normed.to(X.dtype.element_ty).to(tl.float32)
            if BiasParts is not None:
                of_bias += grad
            grad *= weight
            along = tl.sum(grad * normed, 1, keep_dims=True) / hidden_size
            if CENTER:
                grad -= tl.sum(grad, 1, keep_dims=True) / hidden_size
            out = (grad - normed * along) * rstd
            _store_gradient(GradX, GradTotal, out, row, columns, real, stride_t, hidden_size)
        else:
            along = tl.zeros([BLOCK_R, 1], tl.float32)
            level = tl.zeros([BLOCK_R, 1], tl.float32)
            for start in range(0, hidden_size, BLOCK_H):
                place = start + columns
                real = there & (place < hidden_size)
                grad, normed = _gradient_in(Grad, X, row, place, real, stride_g, stride_x, mean, rstd)
                grad *= tl.load(Weight + place, mask=place < hidden_size, other=0.0).to(tl.float32)
                along += tl.sum(grad * normed, 1, keep_dims=True)
                if CENTER:
                    level += tl.sum(grad, 1, keep_dims=True)
            along /= hidden_size
            level /= hidden_size
            for start in range(0, hidden_size, BLOCK_H):
                place = start + columns
                real = there & (place < hidden_size)
                grad, normed = _gradient_in(Grad, X, row, place, real, stride_g, stride_x, mean, rstd)
                grad *= tl.load(Weight + place, mask=place < hidden_size, other=0.0).to(tl.float32)
                out = (grad - level - normed * along) * rstd
                _store_gradient(GradX, GradTotal, out, row, place, real, stride_t, hidden_size)
    if WHOLE:
        line = program * hidden_size + tl.arange(0, BLOCK_H)
        if WeightParts is not None:
            tl.store(WeightParts + line, tl.sum(of_weight, 0), mask=tl.arange(0, BLOCK_H) < hidden_size)
        if BiasParts is not None:
            tl.store(BiasParts + line, tl.sum(of_bias, 0), mask=tl.arange(0, BLOCK_H) < hidden_size)


@triton.jit(do_not_specialize=["rows", "blocks_each"])
def norm_weights(
    Grad, X, Mean, Rstd, WeightParts, BiasParts, stride_g, stride_x, rows, hidden_size, blocks_each,
    CENTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Shares of the gradients of weight and bias, for rows that do not fit in a block: a program has BLOCK_H columns of
    a group of rows."""
    columns = (tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    group = tl.program_id(1).to(tl.int64)
    inside = columns < hidden_size
    of_weight = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    of_bias = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for block in range(blocks_each):
        row = ((group * blocks_each + block) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        there = row < rows
        mean, rstd = _statistics(Mean, Rstd, row, there, CENTER)
        grad, normed = _gradient_in(Grad, X, row, columns, there & inside, stride_g, stride_x, mean, rstd)
        if not CENTER:
            normed = normed.to(X.dtype.element_ty).to(tl.float32)
        of_weight += grad * normed
        of_bias += grad
    line = group * hidden_size + columns
    if WeightParts is not None:
        tl.store(WeightParts + line, tl.sum(of_weight, 0, keep_dims=True), mask=inside)
    if BiasParts is not None:
        tl.store(BiasParts + line, tl.sum(of_bias, 0, keep_dims=True), mask=inside)
