"""How dynamic a dynamic convolution has become: does its kernel depend on the token, or is it one kernel for all?"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jetlab.layers.jetblock import JetBlock
from jetlab.models.surgery import recorded, slots


@torch.no_grad()
def kernels_of(model: PreTrainedModel, tokenizer, text: str) -> tuple[list[str], dict[int, Tensor]]:
    """The tokens of `text`, and layer -> the kernels κ [T, C, W] of its JetBlock on them; the last tap is the token itself.

    A static convolution has the same kernel at every token, a block without one the kernel 1.
    """
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with recorded(model) as tape:
        model.model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), use_cache=False)
    found = {}
    for layer, (slot, (x, _)) in enumerate(zip(slots(model), tape, strict=True)):
        block = slot.paths[slot.active]
        if not isinstance(block, JetBlock):
            continue
        if block.conv_v == "dynamic":
            found[layer] = block.dynamic_conv1d.kernel_generator(x)[0]
        else:
            kernel = x.new_ones(block.dims.value_dim, 1) if block.v_conv is None else block.v_conv
            found[layer] = kernel.expand(len(ids), *kernel.shape)
    return [tokenizer.decode([i]).strip() for i in ids], found


def tap_shares(kernels: Tensor) -> Tensor:
    """Share of each tap in a token's kernel: mean over channels of |κ_j| / Σ_j |κ_j|, [T, W] from κ [T, C, W]."""
    size = kernels.abs()
    return (size / size.sum(-1, keepdim=True).clamp(min=1e-12)).mean(1)


def tap_rows(tokens: list[str], kernels: dict[int, Tensor], n_tokens: int) -> list[dict]:
    """Rows {layer, position, token, back, share} for the first tokens of a text: `back` 0 is the token's own tap."""
    rows = []
    for layer, kernel in kernels.items():
        for position, shares in enumerate(tap_shares(kernel)[:n_tokens].tolist()):
            for tap, share in enumerate(shares):
                back = len(shares) - 1 - tap
                rows.append(
                    {"layer": layer, "position": position, "token": tokens[position], "back": back, "share": share}
                )
    return rows


@torch.no_grad()
def kernel_motion(model: PreTrainedModel, tokenizer, text: str) -> list[dict]:
    """Rows {layer, motion} for every layer of a hybrid, over the tokens of `text`.

    motion = mean_{c,j} sd_t(κ_{t,c,j}) / mean_{t,c,j} |κ_{t,c,j}| of the kernels κ [T, C, W] that JetBlock makes: 0 for a
    kernel that is the same at every token. Blank (None) in a layer that makes no kernels.
    """
    _, kernels = kernels_of(model, tokenizer, text)
    rows = []
    for layer, slot in enumerate(slots(model)):
        moving = getattr(slot.paths[slot.active], "conv_v", None) == "dynamic"
        kernel = kernels.get(layer)
        rows.append({"layer": layer, "motion": float(kernel.std(0).mean() / kernel.abs().mean()) if moving else None})
    return rows
