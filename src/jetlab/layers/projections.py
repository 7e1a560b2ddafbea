"""Several projections of one input, in as few products as pays."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Weights up to this many numbers are laid together for one product: in a model of the study the call of a product costs
# more than the product. At the 2B model's width the copy would cost more than all products of a decoded token.
SMALL = 2**18


def project(x: Tensor, *groups: tuple[nn.Linear, ...]) -> list[Tensor]:
    """For each group of projections their outputs side by side, [..., Σ n_out], from x [..., D].

    A layer that does more than multiply (see `is_plain`), or has a bias, is called as it is.
    """
    layers = [layer for group in groups for layer in group]
    plain = all(is_plain(layer) and layer.bias is None for layer in layers)
    if plain and sum(layer.weight.numel() for layer in layers) <= SMALL:
        sizes = [sum(layer.out_features for layer in group) for group in groups]
        return list(F.linear(x, torch.cat([layer.weight for layer in layers])).split(sizes, dim=-1))
    parts = [[layer(x) for layer in group] for group in groups]
    return [group[0] if len(group) == 1 else torch.cat(group, -1) for group in parts]


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of `layer` is the product with its weight, plus its bias, and nothing else.

    It is not for an adapter or a quantised layer in its place, nor where somebody listens to the call or has put another
    forward on it, as libraries do that fetch weights from elsewhere just before it.
    """
    listened = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is nn.Linear and not listened and "forward" not in vars(layer)
