"""Does cache size or the number of parameters decide decoding speed? (Jet-Nemotron, Sec 2.5 and Table 2)

    python benchmarks/decode_grid.py --shape published --device cuda --batch 64 --context 65536
    python benchmarks/decode_grid.py --shape eighth --batch 16 --context 8192

One decoding step of a batch through 28 layers in Jet-Nemotron-2B's shape: 24 Gated DeltaNets, as in the table, 2 full
attentions, 2 windows, all MLPs and the head, random weights, caches full of random numbers. The nine settings of Table 2,
which hold the same state, and for three of them half and twice the state and half and twice the context, so that cache and
parameters do not move together. `eighth` divides every width by eight, for a CPU.

Prints CSV: setting, parameters and their bytes, bytes of keys and values and of states for a sequence, ms a step (median),
tokens/s, and floor_ms, the time that a copy of as many bytes takes on this machine. On a GPU a step is one CUDA graph in
bf16 with states in fp32; on a CPU fp32 and one thread. A step reads a state and writes the new one elsewhere; keys and
values of the new token are left out.
"""

import argparse
import csv
import statistics
import sys
import time

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from jetlab.layers.norm import RMSNorm
from jetlab.layers.state import map_tensors, n_bytes
from jetlab.paths import resolve

N_LAYERS, FULL, WINDOWED, WINDOW = 28, (14, 19), (20, 21), 1152
WIDTHS = {"d_model": 1536, "d_ff": 8960, "vocabulary": 151936, "n_heads": 12, "n_kv_heads": 2, "head_dim": 128}


class Attention(nn.Module):
    """One token's queries over keys and values that are there already, grouped as in Qwen2.5-1.5B."""

    def __init__(self, width: dict, batch: int, n_keys: int):
        super().__init__()
        d, self.head_dim = width["d_model"], width["head_dim"]
        self.q_proj = nn.Linear(d, width["n_heads"] * self.head_dim)
        self.kv_proj = nn.Linear(d, 2 * width["n_kv_heads"] * self.head_dim)
        self.o_proj = nn.Linear(width["n_heads"] * self.head_dim, d, bias=False)
        shape = (batch, width["n_kv_heads"], n_keys, self.head_dim)
        self.register_buffer("keys", torch.randn(shape, dtype=self.q_proj.weight.dtype))
        self.register_buffer("values", torch.randn(shape, dtype=self.q_proj.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        self.kv_proj(x)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))

    @property
    def cache_bytes(self) -> int:
        return n_bytes([self.keys, self.values])


class Linear(nn.Module):
    """One step of a Gated DeltaNet from a state that is there already."""

    def __init__(self, dims: BlockDims, batch: int):
        super().__init__()
        self.mixer = MIXERS["gated_deltanet"](dims)
        with torch.no_grad():
            _, state = self.mixer(torch.randn(batch, 1, dims.d_model))
        self.state = map_tensors(lambda x: torch.randn_like(x) * 0.1, state)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, self.state)[0]

    @property
    def cache_bytes(self) -> int:
        return n_bytes([self.state])


class Step(nn.Module):
    """Hidden states of one token [B, 1, D] through all layers to logits."""

    def __init__(self, width: dict, dims: BlockDims, batch: int, context: int):
        super().__init__()
        d, ff = width["d_model"], width["d_ff"]

        def mixer(layer: int) -> nn.Module:
            if layer in FULL + WINDOWED:
                return Attention(width, batch, context if layer in FULL else min(context, WINDOW))
            return Linear(dims, batch)

        self.mixers = nn.ModuleList(mixer(layer) for layer in range(N_LAYERS))
        self.norms = nn.ModuleList(RMSNorm(d, 1e-6) for _ in range(2 * N_LAYERS + 1))
        self.up = nn.ModuleList(nn.Linear(d, 2 * ff, bias=False) for _ in range(N_LAYERS))
        self.down = nn.ModuleList(nn.Linear(ff, d, bias=False) for _ in range(N_LAYERS))
        self.head = nn.Linear(d, width["vocabulary"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer, mixer in enumerate(self.mixers):
            x = x + mixer(self.norms[2 * layer](x))
            gate, up = self.up[layer](self.norms[2 * layer + 1](x)).chunk(2, -1)
            x = x + self.down[layer](F.silu(gate) * up)
        return self.head(self.norms[-1](x))

    def cache_bytes(self, kind: type) -> int:
        """Bytes that the layers of a kind keep, for the whole batch."""
        return sum(mixer.cache_bytes for mixer in self.mixers if isinstance(mixer, kind))


def points(divisor: int, d_model: int, context: int) -> list[tuple[str, BlockDims, int]]:
    """(setting, dims, context): the nine rows of Table 2, then three of them at other caches."""
    rows = pd.read_csv(resolve("paper/table2_hardware_aware_search.csv"))
    grid = [(r.n_heads, r.d_k // divisor, r.d_v // divisor) for r in rows.itertuples()]
    chosen = [grid[0], next(s for s in grid if s[0] == 12 and s[1] * divisor == 96), grid[-1]]
    cells = [(shape, context, "") for shape in grid]
    for heads, key, value in chosen:
        cells += [
            ((heads, key, value // 2), context, " half state"),
            ((heads, key, 2 * value), context, " twice the state"),
        ]
        cells += [
            ((heads, key, value), context // 2, " half context"),
            ((heads, key, value), 2 * context, " twice the context"),
        ]
    return [
        (f"{key * divisor}/{value * divisor}/{heads}{what}", BlockDims(d_model, heads, key, value), n)
        for (heads, key, value), n, what in cells
    ]


@torch.no_grad()
def measure(step: Step, x: Tensor, repeats: int) -> float:
    """Median ms of a step; on a GPU of the replayed graph."""
    logits = step(x)
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("a step gave a logit that is no number: the timing would mean nothing")
    if not x.is_cuda:
        return _cpu_ms(lambda: step(x), repeats)
    side = torch.cuda.Stream()
    with (
        torch.cuda.stream(side),
        sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True),
    ):
        for _ in range(3):
            step(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step(x)
    return _gpu_ms(graph.replay, repeats)


def _cpu_ms(call, repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def _gpu_ms(call, repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def copy_bytes_per_ms(device: str) -> float:
    """Bytes that this machine moves in a ms, read and written, by a large copy."""
    source = torch.randn(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    clock = _gpu_ms if device == "cuda" else _cpu_ms
    return 2 * n_bytes([source]) / clock(lambda: target.copy_(source), 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=("published", "eighth"), default="eighth")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--limit", type=int, help="only so many points")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    divisor = 8 if given.shape == "eighth" else 1
    heads = {"n_heads", "n_kv_heads"}
    width = {key: value if key in heads else value // divisor for key, value in WIDTHS.items()}
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    speed = copy_bytes_per_ms(given.device)
    out = csv.writer(sys.stdout)
    columns = ["setting", "context", "batch", "params", "weight_bytes", "kv_bytes", "state_bytes"]
    out.writerow([*columns, "ms", "tokens_per_s", "floor_ms"])
    for setting, dims, context in points(divisor, width["d_model"], given.context)[: given.limit]:
        torch.set_default_dtype(dtype)
        with torch.device(given.device):
            step = Step(width, dims, given.batch, context).eval()
            x = torch.randn(given.batch, 1, width["d_model"])
        torch.set_default_dtype(torch.float32)
        ms = measure(step, x, given.repeats)
        params = sum(p.numel() for p in step.parameters())
        weights, kv, state = params * dtype.itemsize, step.cache_bytes(Attention), step.cache_bytes(Linear)
        floor = (weights + kv + 2 * state) / speed  # states are written, too
        per_sequence = (kv // given.batch, state // given.batch)
        row = [setting, context, given.batch, params, weights, *per_sequence]
        out.writerow([*row, round(ms, 4), round(1e3 * given.batch / ms, 1), round(floor, 4)])
        sys.stdout.flush()
        del step, x
        if given.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
