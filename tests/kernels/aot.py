"""Compiles every kernel for Hopper (sm_90) without a GPU, one JSON object a launch: python aot.py K,V,dtype[,packed|single] …

A launch goes through `JITFunction.run`; here that builds the program for the arguments it is given and starts nothing. What
a launcher would have launched is what is compiled, with the alignment that a run would find.
"""

import inspect
import json
import sys
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from jetlab_kernels import (
    decode_attention,
    dynamic_conv,
    gated_delta_rule,
    gated_rms_norm,
    jetblock_step,
    mamba2_step,
    rotary,
    swiglu,
)

MODULES = (decode_attention, gated_delta_rule, dynamic_conv, gated_rms_norm, jetblock_step, mamba2_step, rotary, swiglu)

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages")


def signature(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[dict, dict, dict]:
    """Types, constants and alignments of a call's arguments, as a run on a GPU would find them."""
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    types, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(bound.items()):
        constant = "constexpr" in str(inspect.signature(kernel.fn).parameters[name].annotation)
        if constant or value is None or (type(value) is int and value == 1):
            types[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            types[name] = "*" + TYPES[value.dtype]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_only(label: str):
    def run(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        types, constants, attributes = signature(kernel, args, kwargs)
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
        program = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = program.asm["ptx"]
        found = {"shape": label, "kernel": kernel.fn.__name__, "shared": program.metadata.shared}
        print(
            json.dumps(found | {"wgmma": "wgmma.mma_async" in ptx, "target_sm_90": ".target sm_90" in ptx}), flush=True
        )

    return run


def launch_all(K: int, V: int, dtype: torch.dtype, *, packed: bool = False, single: bool = False) -> None:
    """Every kernel once, forward and backward, with and without the correction, at head widths K and V.

    `single` is one head of one token: Triton makes a constant of every argument that is 1.
    """
    B, T, H, W = (1, 1, 1, 4) if single else (1, 128, 2, 4)

    def draw(*shape, dtype=dtype):
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    rows = 2 if packed else B
    cu_seqlens = torch.tensor([0, 3, T]) if packed else None
    state = draw(rows, H, K, V, dtype=torch.float32)
    q, k, v, g = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, T, H, dtype=torch.float32)
    for beta in (draw(B, T, H, dtype=torch.float32), None):
        o, _ = gated_delta_rule.gated_delta_rule(q, k, v, g, beta, state=state, cu_seqlens=cu_seqlens, qk_l2norm=True)
        o.sum().backward()
    C, R = H * V, max(1, 12 * V // 8)  # of the published twelve heads: the tiles that they fill
    begin = cu_seqlens[:-1] if packed else None
    history = draw(rows, C, W - 1)
    y = dynamic_conv.dynamic_conv(
        draw(B, T, C), draw(B, T, R), draw(C * W, R), draw(C * W), history=history, begin=begin
    )
    y.sum().backward()
    gated_rms_norm.gated_rms_norm(o.detach().requires_grad_(), draw(B, T, H, V), draw(V)).sum().backward()
    for n in (B, 300):  # few heads, and many
        head = [draw(n, H, K), draw(n, H, K), draw(n, H, V), draw(n, C, W), draw(n, H), draw(n, H), draw(n, H, V)]
        states = {"state": draw(n, H, K, V, dtype=torch.float32), "conv_state": draw(n, C, W - 1)}
        jetblock_step.jetblock_step(*head, draw(H), draw(H), draw(V), **states)
    C = H * V + 2 * K  # a value head of V, a state of K, one group
    token = [draw(B, C), draw(B, H * V), draw(B, H), draw(C, W), draw(C), draw(H), draw(H), draw(H), draw(H * V)]
    states = {"state": draw(B, H, V, K, dtype=torch.float32), "conv_state": draw(B, C, W - 1)}
    mamba2_step.mamba2_step(*token, **states)
    keys, end = draw(B, H, 8 * T, K), torch.tensor(T)
    decode_attention.decode_attention(draw(B, 6 * H, K), keys, keys, end=end, start=end.expand(B).contiguous())
    for weight in (draw(K), None):  # a head's norm, or none
        rotary.rotary(q.transpose(1, 2), k.transpose(1, 2), draw(B, T, K), draw(B, T, K), weight, weight, 1e-6)
    swiglu.swiglu(draw(B, T, H * V), draw(B, T, H * V))


if __name__ == "__main__":
    for module in MODULES:
        module.check_device = lambda *tensors: None
    for shape in sys.argv[1:]:
        K, V, dtype, *how = shape.split(",")
        with mock.patch.object(JITFunction, "run", compile_only(shape)):
            launch_all(int(K), int(V), getattr(torch, dtype), **dict.fromkeys(how, True))
