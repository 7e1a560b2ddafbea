"""How dynamic a dynamic convolution has become: does its kernel depend on the token, or is it one kernel for all?"""

import torch
from transformers import PreTrainedModel

from jetlab.models.surgery import recorded, slots


@torch.no_grad()
def kernel_motion(model: PreTrainedModel, tokenizer, text: str) -> list[dict]:
    """Rows {layer, motion} for every layer of a hybrid, over the tokens of `text`.

    motion = mean_{c,j} sd_t(κ_{t,c,j}) / mean_{t,c,j} |κ_{t,c,j}| of the kernels κ [T, C, W] that JetBlock makes: 0 for a
    kernel that is the same at every token. Blank (None) in a layer that makes no kernels.
    """
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=next(model.parameters()).device)
    with recorded(model) as tape:
        model.model(input_ids=ids, use_cache=False)
    rows = []
    for layer, (slot, (x, _)) in enumerate(zip(slots(model), tape, strict=True)):
        conv = getattr(slot.paths[slot.active], "dynamic_conv1d", None)
        kernels = None if conv is None else conv.kernel_generator(x)[0]
        motion = None if kernels is None else float(kernels.std(0).mean() / kernels.abs().mean())
        rows.append({"layer": layer, "motion": motion})
    return rows
