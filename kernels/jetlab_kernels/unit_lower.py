"""Inverse of a unit lower triangular matrix of 64 rows: M = (I + L)^-1, one for every chunk and head.

    M_r = e_r - Σ_{s<r} L_rs M_s                                  row by row, exact whatever L is
    M_ij = -M_ii Σ_{j≤k<i} L_ik M_kj                              block by block, from the inverses on the diagonal

Reference: torch.linalg.solve_triangular, as jetlab.ops.gated_delta_rule uses it. Substitution through 64 rows would be
one long chain; 15 rows in each of four diagonal blocks at the same time, then three rounds of small products, are not.
Powers of L in place of substitution overflow for repeated keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jetlab_kernels.launch import dot_format

SIDE = 64
N_WARPS = 1  # one warp owns all blocks, so that no step of the substitution waits for another warp


@triton.jit
def _block(l_ptr, i: tl.constexpr, j: tl.constexpr):
    """Block (i, j) of L, 16 × 16."""
    r = tl.arange(0, 16)
    return tl.load(l_ptr + (16 * i + r)[:, None] * 64 + (16 * j + r)[None, :])


@triton.jit
def _put(m_ptr, i: tl.constexpr, j: tl.constexpr, block):
    r = tl.arange(0, 16)
    tl.store(m_ptr + (16 * i + r)[:, None] * 64 + (16 * j + r)[None, :], block.to(m_ptr.dtype.element_ty))


@triton.jit
def _substitute(m, l_ptr, i: tl.constexpr, row):
    """Row `row` of the inverse of diagonal block i, from the rows above it; `m` holds the identity where it is not done."""
    r = tl.arange(0, 16)
    weights = tl.load(l_ptr + (16 * i + row) * 64 + 16 * i + r)
    known = tl.sum(weights[:, None] * m, 0)  # rows from `row` on have weight 0
    return tl.where((r == row)[:, None], m - known[None, :], m)


@triton.jit
def _invert(l_ptr, m_ptr, PRECISION: tl.constexpr):
    """M = (I + L)^-1 with zeros above the diagonal.  Grid (number of matrices,): one program owns one."""
    i_m = tl.program_id(0).to(tl.int64)
    l_ptr += i_m * 64 * 64
    m_ptr += i_m * 64 * 64
    r = tl.arange(0, 16)
    identity = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    m00, m11, m22, m33 = identity, identity, identity, identity
    for row in range(1, 16):
        m00 = _substitute(m00, l_ptr, 0, row)
        m11 = _substitute(m11, l_ptr, 1, row)
        m22 = _substitute(m22, l_ptr, 2, row)
        m33 = _substitute(m33, l_ptr, 3, row)

    l10, l21, l32 = _block(l_ptr, 1, 0), _block(l_ptr, 2, 1), _block(l_ptr, 3, 2)
    m10 = -tl.dot(m11, tl.dot(l10, m00, input_precision=PRECISION), input_precision=PRECISION)
    m21 = -tl.dot(m22, tl.dot(l21, m11, input_precision=PRECISION), input_precision=PRECISION)
    m32 = -tl.dot(m33, tl.dot(l32, m22, input_precision=PRECISION), input_precision=PRECISION)

    l20, l31 = _block(l_ptr, 2, 0), _block(l_ptr, 3, 1)
    sum20 = tl.dot(l21, m10, tl.dot(l20, m00, input_precision=PRECISION), input_precision=PRECISION)
    sum31 = tl.dot(l32, m21, tl.dot(l31, m11, input_precision=PRECISION), input_precision=PRECISION)
    m20 = -tl.dot(m22, sum20, input_precision=PRECISION)
    m31 = -tl.dot(m33, sum31, input_precision=PRECISION)

    sum30 = tl.dot(_block(l_ptr, 3, 0), m00, input_precision=PRECISION)
    sum30 = tl.dot(l31, m10, sum30, input_precision=PRECISION)
    sum30 = tl.dot(l32, m20, sum30, input_precision=PRECISION)
    m30 = -tl.dot(m33, sum30, input_precision=PRECISION)

    zeros = tl.zeros([16, 16], dtype=tl.float32)
    _put(m_ptr, 0, 0, m00)
    _put(m_ptr, 0, 1, zeros)
    _put(m_ptr, 0, 2, zeros)
    _put(m_ptr, 0, 3, zeros)
    _put(m_ptr, 1, 0, m10)
    _put(m_ptr, 1, 1, m11)
    _put(m_ptr, 1, 2, zeros)
    _put(m_ptr, 1, 3, zeros)
    _put(m_ptr, 2, 0, m20)
    _put(m_ptr, 2, 1, m21)
    _put(m_ptr, 2, 2, m22)
    _put(m_ptr, 2, 3, zeros)
    _put(m_ptr, 3, 0, m30)
    _put(m_ptr, 3, 1, m31)
    _put(m_ptr, 3, 2, m32)
    _put(m_ptr, 3, 3, m33)


def invert(lower: Tensor, dtype: torch.dtype) -> Tensor:
    """(I + lower)^-1 in `dtype` for lower [..., 64, 64] in fp32, contiguous, zero on and above the diagonal."""
    inverse = torch.empty_like(lower, dtype=dtype)
    precision = dot_format(torch.float32)["PRECISION"]
    _invert[(lower.numel() // SIDE**2,)](lower, inverse, PRECISION=precision, num_warps=N_WARPS)
    return inverse
