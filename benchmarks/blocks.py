"""Cost of every token mixer on one CPU thread, all in one process.

    python benchmarks/blocks.py [--repeats 20] [training decode growth memory]

training  forward and backward at the study's size, against full attention of the same width
decode    one token at batch 32 and the 2B model's width, against that step's own matrix products: its projections and
          small generators as bare products of the same shapes, and one reading and writing of its state. The rest is
          convolutions, gates, norms and calls.
growth    time per token of a forward pass from 1K to 64K tokens: flat for a linear block, growing for attention
memory    peak memory per token of forward and backward from 4K to 32K tokens, each in a process of its own (Linux)

Times are medians of CPU time of this process, so that other work on the machine counts little; the sides take turns.
The C library hands every block above 32 MiB back to the system and faults it in anew, which costs five times what reading
and writing it does; here it is told to keep them, as a server keeps its states.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from ops import median_ms

LINEAR = tuple(kind for kind in MIXERS if "attention" not in kind)
SMALL = BlockDims(d_model=64, n_heads=4, head_dim=8, head_dim_v=16)  # the study's laptop profile
PUBLISHED = BlockDims(d_model=1536, n_heads=12, head_dim=96, head_dim_v=256)  # Jet-Nemotron-2B, the state for all


def attention(d_model: int) -> nn.Module:
    """Full attention with grouped queries, in the shape of the bundled teacher (2B: of Qwen2.5-1.5B)."""
    shape = (4, 2, 32) if d_model == 64 else (12, 2, 128)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    config = Qwen2Config(hidden_size=d_model, **dict(zip(names, shape, strict=True)))
    config._attn_implementation = "sdpa"
    return MIXERS["attention"].from_attention(Qwen2Attention(config, 0), Qwen2RotaryEmbedding(config))


def training(repeats: int, B: int = 8, T: int = 256) -> None:
    torch.manual_seed(0)
    mixers = {"attention": attention(SMALL.d_model)} | {kind: MIXERS[kind](SMALL) for kind in LINEAR}
    x = torch.randn(B, T, SMALL.d_model, requires_grad=True)

    def call(mixer):
        y, _ = mixer(x)
        torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])

    times = median_ms([lambda mixer=mixer: call(mixer) for mixer in mixers.values()], repeats)
    print(
        f"training: B={B} T={T} d_model={SMALL.d_model}, forward and backward\n{'block':16} {'ms':>8} {'of attention':>13}"
    )
    for name, ms in zip(mixers, times, strict=True):
        print(f"{name:16} {ms:8.2f} {ms / times[0]:13.2f}")


def products(mixer: nn.Module, B: int):
    """The matrix products of one token: each matrix of `mixer` with an input of its own width."""
    matrices = [p for name, p in mixer.named_parameters() if p.ndim == 2 and not _is_elementwise(name)]
    inputs = [torch.randn(B, matrix.shape[1]) for matrix in matrices]
    return lambda: [F.linear(x, matrix) for x, matrix in zip(inputs, matrices, strict=True)]


def _is_elementwise(name: str) -> bool:
    """Whether a parameter of two dimensions is not the matrix of a product: kernels, mixtures, bonuses."""
    return name in ("conv", "mu", "r_k") or name.endswith("conv")


@torch.no_grad()
def decode(repeats: int, B: int = 32) -> None:
    torch.manual_seed(0)
    print(f"\ndecode: one token, B={B}, d_model={PUBLISHED.d_model}, state {PUBLISHED.state_size} numbers a row")
    print(f"{'block':16} {'ms':>8} {'products':>9} {'of products':>12} {'state':>6} {'of both':>8}")
    old = torch.randn(B, PUBLISHED.n_heads, PUBLISHED.head_dim, PUBLISHED.head_dim_v)
    new, decay = torch.empty_like(old), torch.rand(B, PUBLISHED.n_heads, 1, 1)
    (touch,) = median_ms([lambda: torch.mul(old, decay, out=new)], repeats)
    for kind in LINEAR:
        mixer = MIXERS[kind](PUBLISHED).eval()
        _, state = mixer(torch.randn(B, 8, PUBLISHED.d_model))
        x = torch.randn(B, 1, PUBLISHED.d_model)
        step, bare = median_ms([lambda mixer=mixer, state=state, x=x: mixer(x, state), products(mixer, B)], repeats)
        ratios = f"{step / bare:12.2f} {touch:6.2f} {step / (bare + touch):8.2f}"
        print(f"{kind:16} {step:8.2f} {bare:9.2f} {ratios}", flush=True)


@torch.no_grad()
def growth(repeats: int, lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)) -> None:
    torch.manual_seed(0)
    print(f"\ngrowth: B=1 d_model={SMALL.d_model}, µs per token of a forward pass at T tokens")
    print(f"{'block':16} " + " ".join(f"{T:>8}" for T in lengths))
    for kind in (*LINEAR, "attention"):
        mixer = attention(SMALL.d_model) if kind == "attention" else MIXERS[kind](SMALL)
        inputs = [torch.randn(1, T, SMALL.d_model) for T in lengths]
        times = [median_ms([lambda mixer=mixer, x=x: mixer(x)], max(1, repeats // 10))[0] for x in inputs]
        print(
            f"{kind:16} " + " ".join(f"{1e3 * ms / T:8.2f}" for ms, T in zip(times, lengths, strict=True)), flush=True
        )


def memory(_repeats: int, lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)) -> None:
    print(f"\nmemory: B=1 d_model={SMALL.d_model}, KiB per token at the peak of forward and backward")
    print(f"{'block':16} " + " ".join(f"{T:>8}" for T in lengths))
    for kind in LINEAR:
        peaks = []
        for T in lengths:
            command = [sys.executable, __file__, "--peak", kind, str(T)]
            plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
            peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True, env=plain).stdout))
        print(f"{kind:16} " + " ".join(f"{kib / T:8.1f}" for kib, T in zip(peaks, lengths, strict=True)), flush=True)


def peak(kind: str, T: int) -> int:
    """KiB that forward and backward over T tokens need beyond what a short call does."""
    torch.manual_seed(0)
    mixer = MIXERS[kind](SMALL)

    def highest(T):
        y, _ = mixer(torch.randn(1, T, SMALL.d_model))
        y.square().sum().backward()
        status = Path("/proc/self/status").read_text()  # getrusage would count what the parent held when it forked
        return int(status.split("VmHWM:")[1].split()[0])

    return -highest(64) + highest(T)


PARTS = {"training": training, "decode": decode, "growth": growth, "memory": memory}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="all four by default")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each side (default 20)")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "T"), help=argparse.SUPPRESS)
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and not arguments.peak:
        keep = {
            "MALLOC_MMAP_THRESHOLD_": str(2**32),
            "MALLOC_TRIM_THRESHOLD_": str(2**33),
        }  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | keep)
    if arguments.peak:
        print(peak(arguments.peak[0], int(arguments.peak[1])))
    else:
        for part in arguments.parts:
            PARTS[part](arguments.repeats)
