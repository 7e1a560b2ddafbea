"""Products of queries and keys whose channels fade, each at its own rate, from the key's time to the query's.

    P_ts = Σ_d x_td y_sd exp(Σ_{s<r≤t} g_rd)  for s ≤ t, and 0 for s > t          inside a chunk of C tokens

With one decay per channel this is no matrix product, and splitting the exponential in two, exp(G_t) exp(-G_s), overflows
for strong decay. But between the two halves of a range it can be split at the border, where both parts only shrink:
what t has faded since the border, and what s fades until there. So a range of 2h tokens is one product between its
halves plus the same for each half: log2(C) products, every exponent ≤ 0, and every exponent a sum of decays of one sign,
never a difference of two sums. Nothing overflows or loses digits whatever the decay, -inf included.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def decayed_products(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """P [b,n,m,C,C] between n queries and m keys a token: x [b,C,n,K], y [b,C,m,K], log-decay g [b,C,K] ≤ 0.

    C must be a power of two. The gradient is analytic and can be taken once.
    """
    return _DecayedProducts.apply(x, y, g)


class _DecayedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, g):
        x, y, g = (tensor.contiguous() for tensor in (x, y, g))
        b, C, n, K = x.shape
        m = y.shape[2]
        P = x.new_zeros(b, n, m, C, C)
        diagonal = torch.bmm(x.view(-1, n, K), y.view(-1, m, K).mT)
        P.diagonal(dim1=3, dim2=4).copy_(diagonal.view(b, C, n, m).permute(0, 2, 3, 1))
        levels = []
        for h, since, until in _levels(g):
            later, sooner = x.view(b, -1, 2, h, n, K)[:, :, 1], y.view(b, -1, 2, h, m, K)[:, :, 0]
            left, right = later * since.unsqueeze(3), sooner * until.unsqueeze(3)
            product = torch.bmm(left.view(-1, h * n, K), right.view(-1, h * m, K).mT)
            _blocks(P, h).copy_(product.view(b, -1, h, n, h, m).permute(0, 3, 5, 2, 4, 1))
            levels += [since, until, left, right]
        ctx.save_for_backward(x, y, *levels)
        return P

    @staticmethod
    @once_differentiable
    def backward(ctx, dP):
        x, y, *levels = ctx.saved_tensors
        dP = dP.contiguous()
        b, C, n, K = x.shape
        m = y.shape[2]
        diagonal = dP.diagonal(dim1=3, dim2=4).permute(0, 3, 1, 2).reshape(-1, n, m)
        dx = torch.bmm(diagonal, y.view(-1, m, K)).view_as(x)
        dy = torch.bmm(diagonal.mT, x.view(-1, n, K)).view_as(y)
        # exp(G_t - G_s) P_ts: each G_t collects x_t dx_t as a query and -y_t dy_t as a key; the diagonal has no decay.
        dG = x.new_zeros(b, C, K)
        for i in range(0, len(levels), 4):
            since, until, left, right = levels[i : i + 4]
            h = since.shape[2]
            block = _blocks(dP, h).permute(0, 5, 3, 1, 4, 2).reshape(-1, h * n, h * m)
            dleft = torch.bmm(block, right.view(-1, h * m, K)).view_as(left)
            dright = torch.bmm(block.mT, left.view(-1, h * n, K)).view_as(right)
            dx.view(b, -1, 2, h, n, K)[:, :, 1].addcmul_(dleft, since.unsqueeze(3))
            dy.view(b, -1, 2, h, m, K)[:, :, 0].addcmul_(dright, until.unsqueeze(3))
            halves = dG.view(b, -1, 2, h, K)
            halves[:, :, 1] += (left * dleft).sum(3)
            halves[:, :, 0] -= (right * dright).sum(3)
        dg = dG.flip(1).cumsum(1).flip(1)
        return dx, dy, dg


def _levels(g: Tensor):
    """(h, since, until) for h = 1, 2, 4 … C/2: factors [b, C/2h, h, K] of the later and of the earlier half of each range.

    `since` is the decay from the border up to and with a token of the later half, `until` that behind a token of the
    earlier half up to the border.
    """
    b, C, K = g.shape
    ahead, behind = g.clone(), torch.zeros_like(g)  # within ranges of h tokens: with the token itself; without it
    h = 1
    while h < C:
        ahead2, behind2 = ahead.view(b, -1, 2, h, K), behind.view(b, -1, 2, h, K)
        yield h, ahead2[:, :, 1].exp(), behind2[:, :, 0].exp()
        total = ahead2[:, :, :, -1:]
        first, second = total[:, :, 0].clone(), total[:, :, 1].clone()
        ahead2[:, :, 1] += first
        behind2[:, :, 0] += second
        h *= 2


def _blocks(P: Tensor, h: int) -> Tensor:
    """View [b, n, m, h, h, C/2h] of the products between the later and the earlier half of each range of 2h tokens."""
    b, n, m, C, _ = P.shape
    ranges = C // (2 * h)
    return P.view(b, n, m, ranges, 2, h, ranges, 2, h)[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5)
