"""The Triton kernels on one GPU: first whether they are right, then how long they take, beside peers and the floor.

    python benchmarks/kernels.py --out records/h100/kernels [--only step] [--repeats 30]

One line a shape, pass and peer. Each kernel's outputs and gradients, at the timed shape and format and into tensors
filled with NaN, are compared with the definition's chunked form in fp64 on the same inputs; max_rel_error is the
largest of ‖ours - theirs‖ / ‖theirs‖. A line that misses its bound says checked = no and carries no time. Peers are our
own PyTorch form ("pytorch": the chunked recurrence, which computes in fp32; the kernels of a dynamic convolution
written out as the released code does; a step op by op) and, where it is installed, flash-linear-attention ("fla", with
the error of its own outputs in peer_error).

floor_ms is the longer of two times: bytes that must move (each input read and each output written once; going back the
same inputs and a gradient for each output read, a gradient of each input written) at the speed of a copy, and
operations of the products in the chunked form at the speed of an 8192³ product, both measured at the start. A backward
pass counts twice its forward's products: what a kernel computes a second time to save memory is its own affair. Calls
are timed by events after a warm-up, median; a single step as replays of a CUDA graph over input sets whose states
exceed the cache together. first_s is the first call of a line in seconds, with an empty compiler cache: what a new shape
costs, but for the kernels that lines above have built already.

Writes kernels.csv, state_format.csv (error of a bf16 state over 65,536 steps), environment.json and command.txt.
"""

import argparse
import csv
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jetlab.layers.dims import BlockDims
from jetlab.layers.init import decay_parameters
from jetlab.layers.jetblock import JetBlock
from jetlab.layers.norm import GatedRMSNorm
from jetlab.ops import (
    decode_attention,
    gated_delta_rule,
    gated_linear_attention,
    generated_conv,
    jetblock_step,
    jetblock_step_reference,
)
from jetlab_kernels.gated_rms_norm import gated_rms_norm

CHUNK = 64
COLUMNS = "op pass shape dtype ms peer peer_ms floor_ms flops bytes max_rel_error peer_error checked first_s".split()
BOUND = 1.5e-2  # of one operation in bf16, whose factors have 8 bits
FP32_BOUND = 1e-4
LAYER_BOUND = 3e-2  # of a layer: several roundings in a row
# Peers that cannot do an op's pass, which some find out after tuning for a minute: they are asked once.
REFUSED: set[tuple[str, str, str]] = set()
JET_2B = BlockDims(d_model=1536, n_heads=12, head_dim=96, head_dim_v=256)


@dataclass
class Case:
    """One operation at one shape: what is called, what its products and bytes are in one pass, who else can do it."""

    op: str
    shape: str
    inputs: dict[str, Tensor | None]
    call: Callable[..., tuple[Tensor, ...]]  # (backend, **inputs)
    flops: float
    bytes_in: float
    bytes_out: float
    peers: dict[str, Callable[..., tuple[Tensor, ...]]] = field(default_factory=dict)
    weights: Callable[[str, torch.dtype], list[Tensor]] = lambda backend, dtype: []
    bound: float = BOUND


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of `call` on the GPU.

    In front of each call 2 GiB are read: the cache holds nothing of the last one, and Python has queued the call before the
    GPU comes to it.
    """
    for _ in range(3):
        call()
    flood = torch.ones(2**29, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flood.sum()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def ceilings() -> dict[str, float]:
    """Bytes/s of a copy (read and written) and operations/s of an 8192³ product in bf16, on random data."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source), 20) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"bytes_per_s": copy, "flops_per_s": 2 * 8192**3 / milliseconds(lambda: a @ b, 20) * 1e3}


def first_call(call: Callable[[], object]) -> float:
    """Seconds of `call` when nothing it needs lies in the compiler's cache on disk."""
    with tempfile.TemporaryDirectory() as empty, triton.knobs.cache.scope():
        triton.knobs.cache.dir = empty
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start


@contextmanager
def poisoned():
    """What launchers allocate begins as NaN."""
    with (
        mock.patch.object(torch, "empty", lambda *a, _f=torch.empty, **k: _f(*a, **k).fill_(torch.nan)),
        mock.patch.object(torch, "empty_like", lambda *a, _f=torch.empty_like, **k: _f(*a, **k).fill_(torch.nan)),
    ):
        yield


def evaluate(case: Case, backend: str, upstream: list[Tensor] | None, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs, and with `upstream` the gradients of every input that is a tensor, and of the case's weights."""
    leaves = {
        name: x.detach().to(dtype or x.dtype).requires_grad_(upstream is not None) if isinstance(x, Tensor) else x
        for name, x in case.inputs.items()
    }
    call = case.peers.get(backend)
    outputs = call(**leaves) if call else case.call(backend, **leaves)
    if upstream is None:
        return list(outputs)
    wanted = [x for x in leaves.values() if isinstance(x, Tensor)]
    wanted += case.weights(backend, wanted[0].dtype)
    return [
        *outputs,
        *torch.autograd.grad(
            outputs, wanted, grad_outputs=[up.to(y.dtype) for y, up in zip(outputs, upstream, strict=True)]
        ),
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in fp64; infinite if a number is missing on either side."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else float("inf")


def measure(case: Case, ceiling: dict[str, float], repeats: int) -> list[dict]:
    """Lines of one case: forward, and forward and backward."""
    rows = one_pass(case, "forward", None, ceiling, repeats)
    torch.cuda.empty_cache()
    rng = torch.Generator(device="cuda").manual_seed(1)
    outputs = evaluate(
        case, "chunked", None
    )  # in the format of each, so that no cast is timed, and none rounds one side
    upstream = [torch.randn(y.shape, device="cuda", generator=rng).to(y.dtype) for y in outputs]
    rows += one_pass(case, "forward+backward", upstream, ceiling, repeats)
    torch.cuda.empty_cache()
    return rows


def one_pass(
    case: Case, name: str, upstream: list[Tensor] | None, ceiling: dict[str, float], repeats: int
) -> list[dict]:
    exact = evaluate(case, "chunked", upstream, torch.float64)

    def errors(backend: str) -> list[float]:
        return [relative_error(x, y) for x, y in zip(evaluate(case, backend, upstream), exact, strict=True)]

    first_s = first_call(lambda: evaluate(case, "triton", upstream))
    with poisoned():
        ours = errors("triton")
    error = max(ours)
    checked = error < case.bound
    if not checked:
        print(
            f"{case.op} {case.shape} {name}: errors of outputs and gradients {[f'{x:.1e}' for x in ours]}", flush=True
        )
    ms = milliseconds(lambda: evaluate(case, "triton", upstream), repeats) if checked else None
    # Back, what came out comes in again as a gradient beside all inputs, and a gradient of each input leaves.
    n_bytes = case.bytes_in + case.bytes_out + (2 * case.bytes_in + case.bytes_out if upstream else 0)
    flops = (3 if upstream else 1) * case.flops
    dtype = str(next(x.dtype for x in case.inputs.values() if isinstance(x, Tensor))).removeprefix("torch.")
    rows = []
    for peer, backend in {"pytorch": "chunked", **{name: name for name in case.peers}}.items():
        row = {"op": case.op, "pass": name, "shape": case.shape, "dtype": dtype, "ms": ms, "peer": peer}
        row |= {"flops": flops, "bytes": n_bytes, "max_rel_error": error, "checked": "yes" if checked else "no"}
        row["first_s"] = first_s
        row["floor_ms"] = max(n_bytes / ceiling["bytes_per_s"], flops / ceiling["flops_per_s"]) * 1e3
        if (peer, case.op, name) not in REFUSED:
            try:
                row["peer_error"] = max(errors(backend))
                row["peer_ms"] = milliseconds(lambda backend=backend: evaluate(case, backend, upstream), repeats)
            except (RuntimeError, ValueError) as failure:  # out of memory and what is not implemented are RuntimeErrors
                print(f"{case.op} {case.shape} {name}: {peer} failed: {str(failure)[:200]}", flush=True)
                if not isinstance(failure, torch.OutOfMemoryError):
                    REFUSED.add((peer, case.op, name))
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    def number(name: str) -> str:
        value = row.get(name)
        return "      –" if value is None else f"{value:7.3f}"

    print(
        f"{row['op']:24} {row['pass']:17} {row['shape']:26} {row['dtype']:9} ours {number('ms')}  {row['peer']:8} "
        f"{number('peer_ms')}  floor {number('floor_ms')} ms  error {row['max_rel_error']:.1e} checked {row['checked']}",
        flush=True,
    )


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    rng = torch.Generator(device="cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, device="cuda", generator=rng).to(dtype)


def recurrence(B: int, T: int, H: int, K: int, V: int, *, delta: bool, dtype: torch.dtype = torch.bfloat16) -> Case:
    """With delta the JetBlock's call: norms inside, gates of the published ranges. Without: retention and Mamba2."""
    tokens, e = B * T * H, dtype.itemsize
    q, k, v = (draw(B, T, H, X, dtype=dtype, seed=seed) for seed, X in enumerate((K, K, V)))
    inputs = {"q": q, "k": k, "v": v, "g": -F.softplus(draw(B, T, H, dtype=torch.float32) - 2)}
    flops = tokens * 2 * (CHUNK * K + CHUNK * V + 2 * K * V)  # A, A X; reading and writing the state
    peers = {}
    if delta:
        inputs["beta"] = torch.sigmoid(draw(B, T, H, dtype=torch.float32, seed=3))
        flops += tokens * 2 * (CHUNK * K + CHUNK * V + K * V)  # L, M R; what the state holds under each key
    else:
        inputs["k"] = k * K**-0.5
    rule = gated_delta_rule if delta else gated_linear_attention

    def call(backend, **x):
        return rule(**x, qk_l2norm=delta, backend=backend)

    if importlib.util.find_spec("fla"):
        peers["fla"] = fla_delta_rule if delta else fla_linear_attention
    shape = f"{B}x{T}x{H}x{K}x{V}"
    sizes = {"bytes_in": tokens * (e * (2 * K + V) + 4 * (1 + delta)), "bytes_out": tokens * e * V + 4 * B * H * K * V}
    op, bound = "gated_delta_rule" if delta else "gated_linear_attention", BOUND if e == 2 else FP32_BOUND
    return Case(op, shape, inputs, call, flops, **sizes, peers=peers if e == 2 else {}, bound=bound)


def fla_delta_rule(q, k, v, g, beta):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, output_final_state=True)


def fla_linear_attention(q, k, v, g):
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=g, output_final_state=True)


def convolution(B: int, T: int, C: int, R: int, W: int = 4, *, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The kernel generator's second product, the convolution and SiLU."""
    drawn = {"x": (B, T, C), "hidden": (B, T, R), "weight": (C * W, R), "bias": (C * W,)}
    inputs = {name: draw(*shape, dtype=dtype, seed=seed) for seed, (name, shape) in enumerate(drawn.items())}
    inputs["weight"] *= R**-0.5

    def call(backend, **x):
        y, _ = generated_conv(**x, activation="silu", backend=backend)
        return (y,)

    e, flops = dtype.itemsize, 2.0 * B * T * C * W * R
    sizes = {"bytes_in": e * (B * T * (C + R) + C * W * R), "bytes_out": e * B * T * C}
    bound = BOUND if e == 2 else FP32_BOUND
    return Case("dynamic_conv", f"{B}x{T}x{C} R={R} W={W}", inputs, call, flops, **sizes, bound=bound)


def norm(B: int, T: int, H: int, V: int) -> Case:
    """RMSNorm of each head and the gate's product."""
    inputs = {"o": draw(B, T, H, V), "z": draw(B, T, H, V, seed=1), "weight": draw(V, dtype=torch.float32)}
    module = GatedRMSNorm(V, backend="chunked")

    def call(backend, o, z, weight):
        if backend == "triton":
            return (gated_rms_norm(o, z, weight, module.eps),)
        return (torch.func.functional_call(module, {"weight": weight}, (o, z)),)

    return Case(
        "gated_rms_norm", f"{B}x{T}x{H}x{V}", inputs, call, 0.0, bytes_in=4 * B * T * H * V, bytes_out=2 * B * T * H * V
    )


def layer(B: int, T: int) -> Case:
    """A whole JetBlock in Jet-Nemotron-2B's shape, its products included; weights in bf16."""
    rng = torch.Generator().manual_seed(0)
    blocks = {
        (backend, dtype): JetBlock(JET_2B, backend=backend, random_start=True, generator=rng.manual_seed(0)).to(
            "cuda", dtype
        )
        for backend in ("triton", "chunked")
        for dtype in (torch.bfloat16, torch.float64)
    }
    for (_, dtype), block in blocks.items():  # the same weights, rounded once
        for weight, rounded in zip(block.parameters(), blocks["triton", torch.bfloat16].parameters(), strict=True):
            weight.data.copy_(rounded.data.to(dtype))

    def call(backend, x):
        y, state = blocks[backend, x.dtype](x)
        return y, state.recurrent

    def weights_of(backend, dtype):
        return list(blocks[backend, dtype].parameters())

    D, H, Kd, Vd = JET_2B.d_model, JET_2B.n_heads, JET_2B.key_dim, JET_2B.value_dim
    R, W = Vd // 8, JET_2B.conv_size
    rule = recurrence(1, CHUNK, H, JET_2B.head_dim, JET_2B.head_dim_v, delta=True)
    flops = B * T * (2 * (D * (2 * Kd + 3 * Vd + 2 * H) + D * R + R * W * Vd) + rule.flops / CHUNK)
    weights = sum(p.numel() for p in blocks["triton", torch.bfloat16].parameters())
    sizes = {"bytes_in": 2 * (B * T * D + weights), "bytes_out": 2 * B * T * D}
    return Case(
        "jetblock", f"{B}x{T}x{D}", {"x": draw(B, T, D)}, call, flops, **sizes, weights=weights_of, bound=LAYER_BOUND
    )


STEP = ("q", "k", "v", "kernels", "a", "b", "z", "A_log", "dt_bias", "weight")


def step_inputs(B: int, H: int, K: int, V: int, W: int, state_dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    A_log, dt_bias = (p.detach().cuda() for p in decay_parameters(H, torch.Generator().manual_seed(seed)))
    drawn = {"q": (H, K), "k": (H, K), "v": (H, V), "kernels": (H * V, W), "a": (H,), "b": (H,), "z": (H, V)}
    inputs = {name: draw(B, *shape, seed=seed + i) for i, (name, shape) in enumerate(drawn.items())}
    inputs |= {"A_log": A_log, "dt_bias": dt_bias, "weight": draw(V, dtype=torch.float32, seed=seed)}
    state = draw(B, H, K, V, dtype=torch.float32, seed=seed).to(state_dtype)
    return inputs | {"state": state, "conv_state": draw(B, H * V, W - 1, seed=seed)}


def step(backend: str, **x) -> tuple[Tensor, Tensor, Tensor]:
    states = {name: x.pop(name) for name in ("state", "conv_state")}
    tensors = [x[name] for name in STEP]
    return jetblock_step(*tensors, **states, backend=backend)


def steps(B: int, state_dtype: torch.dtype, ceiling: dict[str, float], repeats: int) -> list[dict]:
    """One decoding step of a layer, from one state to another: a graph's replay over sets that exceed the cache together."""
    H, K, V, W = JET_2B.n_heads, JET_2B.head_dim, JET_2B.head_dim_v, JET_2B.conv_size
    state_bytes = B * H * K * V * state_dtype.itemsize
    sets = [step_inputs(B, H, K, V, W, state_dtype, seed) for seed in range(max(2, int(2e8 // state_bytes)))]

    def replayed(backend: str) -> float:
        def all_sets() -> list:
            return [step(backend, **x) for x in sets]

        all_sets()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = all_sets()  # all kept, so that each set has memory of its own to write to
        ms = milliseconds(graph.replay, repeats) / len(sets)
        del outputs
        return ms

    exact = step("reference", **{name: x.double() for name, x in sets[0].items()})
    first_s = first_call(lambda: step("triton", **sets[0]))
    with poisoned():
        errors = [relative_error(x, y) for x, y in zip(step("triton", **sets[0]), exact, strict=True)]
    peer_errors = [relative_error(x, y) for x, y in zip(step("reference", **sets[0]), exact, strict=True)]
    small = sum(x.nbytes for name, x in sets[0].items() if name not in ("state", "A_log", "dt_bias", "weight"))
    n_bytes, flops = 2 * state_bytes + small + 2 * B * H * V * (1 + W - 1), 8.0 * B * H * K * V
    checked = max(errors) < BOUND
    row = {"op": "jetblock_step", "pass": "decode", "shape": f"{B}x{H}x{K}x{V}", "peer": "pytorch", "flops": flops}
    row |= {"dtype": f"state {str(state_dtype).removeprefix('torch.')}", "bytes": n_bytes}
    row |= {"floor_ms": n_bytes / ceiling["bytes_per_s"] * 1e3, "checked": "yes" if checked else "no"}
    row |= {"max_rel_error": max(errors), "peer_error": max(peer_errors), "first_s": first_s}
    row["ms"] = replayed("triton") if checked else None
    row["peer_ms"] = replayed("reference")
    show(row)
    return [row]


@torch.no_grad()
def token_attention(B: int, H: int, HKV: int, C: int, D: int, ceiling: dict[str, float], repeats: int) -> list[dict]:
    """A token over a full cache of C slots; checked on one row, since in fp64 all of them would not fit.

    The peer is PyTorch's cuDNN backend, which is told the length when it is called: no captured graph can grow with it.
    """
    q, keys, values = draw(B, H, D), *(draw(B, HKV, C, D, seed=seed) for seed in (1, 2))
    end = torch.tensor(C, device="cuda")

    def ours() -> Tensor:
        return decode_attention(q, keys, values, end=end, backend="triton")

    def cudnn() -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]

    exact = decode_attention(*(x[-1:].double() for x in (q, keys, values)), end=end, backend="reference")
    first_s = first_call(ours)
    with poisoned():
        error = relative_error(ours()[-1:], exact)
    n_bytes, flops = keys.nbytes + values.nbytes + 2 * q.nbytes, 4.0 * B * H * C * D
    row = {"op": "decode_attention", "pass": "decode", "shape": f"{B}x{H}/{HKV}x{C}x{D}", "dtype": "bfloat16"}
    row |= {"peer": "cudnn", "flops": flops, "bytes": n_bytes, "first_s": first_s, "max_rel_error": error}
    row |= {"checked": "yes" if error < BOUND else "no", "peer_error": relative_error(cudnn()[-1:], exact)}
    row["floor_ms"] = n_bytes / ceiling["bytes_per_s"] * 1e3
    row["ms"] = milliseconds(ours, repeats) if error < BOUND else None
    row["peer_ms"] = milliseconds(cudnn, repeats)
    show(row)
    return [row]


@torch.no_grad()
def state_format(n_steps: int = 65_536, B: int = 2) -> list[dict]:
    """Outputs and state of one head group after so many steps with the state in bf16 and in fp32, against fp64.

    Every step draws new inputs; the gates begin as a JetBlock's do, so some heads forget in a few tokens and some hardly.
    """
    H, K, V, W = JET_2B.n_heads, JET_2B.head_dim, JET_2B.head_dim_v, JET_2B.conv_size
    base = step_inputs(B, H, K, V, W, torch.float32, 0)
    names = ("q", "k", "v", "kernels", "a", "b", "z")
    start = {"state": torch.zeros_like(base["state"]), "conv_state": torch.zeros_like(base["conv_state"])}
    carried = {
        "float64": {name: x.double() for name, x in start.items()},
        "float32": dict(start),
        "bfloat16": {"state": start["state"].bfloat16(), "conv_state": start["conv_state"]},
    }
    rows, rng = [], torch.Generator(device="cuda").manual_seed(0)
    for t in range(1, n_steps + 1):
        for name in names:
            base[name] = torch.randn(base[name].shape, device="cuda", generator=rng).bfloat16()
        outputs = {}
        for dtype, states in carried.items():
            tensors = [base[name] for name in STEP]
            if dtype == "float64":
                y, state, conv = jetblock_step_reference(*(x.double() for x in tensors), **states)
            else:
                y, state, conv = jetblock_step(*tensors, **states, backend="triton")
            carried[dtype] = {"state": state, "conv_state": conv}
            outputs[dtype] = y
        if t & (t - 1) == 0 and t >= 64:
            for dtype in ("float32", "bfloat16"):
                errors = {
                    "output_error": relative_error(outputs[dtype], outputs["float64"]),
                    "state_error": relative_error(carried[dtype]["state"], carried["float64"]["state"]),
                }
                rows.append({"step": t, "state": dtype} | errors)
                print(f"step {t:6d} state {dtype:9} " + " ".join(f"{k} {v:.2e}" for k, v in errors.items()), flush=True)
    return rows


def write(path: Path, rows: list[dict], columns: list[str]) -> None:
    def text(value) -> object:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else value

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text(row.get(name)) for name in columns} for row in rows)


TOKENS = [  # rows, query and key-value heads, slots, channels: Jet-Nemotron-2B at 64K and its window, Qwen3-1.7B, Gemma3-1B
    (128, 12, 2, 65536, 128),
    (128, 12, 2, 1152, 128),
    (16, 16, 8, 65536, 128),
    (128, 16, 8, 4096, 128),
    (32, 4, 1, 65536, 256),
]
CASES: dict[str, list[Callable[[], Case]]] = {
    "delta": [
        lambda: recurrence(4, 4096, 12, 96, 256, delta=True),
        lambda: recurrence(1, 32768, 12, 96, 256, delta=True),
        lambda: recurrence(4, 4096, 16, 128, 256, delta=True),
        lambda: recurrence(4, 4096, 4, 256, 288, delta=True),
        lambda: recurrence(16, 512, 4, 16, 32, delta=True),
        lambda: recurrence(4, 4096, 12, 96, 256, delta=True, dtype=torch.float32),
        lambda: recurrence(16, 512, 4, 8, 16, delta=True, dtype=torch.float32),
    ],
    "attention": [
        lambda: recurrence(4, 4096, 12, 128, 128, delta=False),
        lambda: recurrence(4, 4096, 48, 96, 64, delta=False),
    ],
    "norm": [lambda: norm(4, 4096, 12, 256)],
    "conv": [
        lambda: convolution(4, 4096, 3072, 384),
        lambda: convolution(4, 4096, 4096, 512),
        lambda: convolution(16, 512, 64, 8, dtype=torch.float32),
    ],
    "layer": [lambda: layer(4, 4096)],
}
OTHERS = ("step", "token", "format")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--only", nargs="+", choices=[*CASES, *OTHERS], default=[*CASES, *OTHERS])
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each side (default 30)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/kernels.py measures on a CUDA device, and PyTorch sees none; tests/kernels check without one"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    ceiling = ceilings()
    print(
        f"copy {ceiling['bytes_per_s'] / 1e12:.2f} TB/s, product {ceiling['flops_per_s'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    rows = []
    for name in arguments.only:
        for case in CASES.get(name, []):
            rows += measure(case(), ceiling, arguments.repeats)
            write(arguments.out / "kernels.csv", rows, COLUMNS)
    if "step" in arguments.only:
        for state_dtype in (torch.float32, torch.bfloat16):
            for B in (1, 16, 128, 256):
                rows += steps(B, state_dtype, ceiling, arguments.repeats)
    if "token" in arguments.only:
        for shape in TOKENS:
            rows += token_attention(*shape, ceiling, arguments.repeats)
    write(arguments.out / "kernels.csv", rows, COLUMNS)
    if "format" in arguments.only:
        write(arguments.out / "state_format.csv", state_format(), ["step", "state", "output_error", "state_error"])
    fla = importlib.util.find_spec("fla")
    environment = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": triton.knobs.nvidia.ptxas.version,
        "flash_linear_attention": __import__("fla").__version__ if fla else None,
    } | {name: float(f"{value:.4g}") for name, value in ceiling.items()}
    (arguments.out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    (arguments.out / "command.txt").write_text("python " + " ".join(sys.argv) + "\n")


if __name__ == "__main__":
    main()
