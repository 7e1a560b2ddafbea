"""Speed of the recurrences on one CPU thread, forward and backward, both sides in one process.

    python benchmarks/ops.py [--repeats 30]

1. Gated delta rule against `torch_chunk_gated_delta_rule` of Transformers (Qwen3-Next), on the same inputs, with the
   largest relative error of output and gradients between the two.
2. The other recurrences against the gated delta rule at the same sizes: what a decay per channel or a free correction
   costs more.

Times are medians of CPU time of this process, so that other work on the machine counts little; the sides take turns.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from jetlab.ops import dplr_delta_rule, gated_delta_rule, gated_linear_attention

RULES = [  # B, T, H, K, V
    (8, 256, 4, 8, 16),  # the study's laptop profile
    *((8, T, 4, 16, 16) for T in (128, 256, 512, 1024)),
    *((8, T, 4, 32, 32) for T in (128, 1024)),
    *((2, T, 4, 64, 64) for T in (256, 1024)),
    *((1, T, 4, 96, 128) for T in (256, 1024)),
]


def median_ms(calls, repeats: int) -> list[float]:
    """Median CPU time of each call in milliseconds; every round runs each call once."""
    times = [[] for _ in calls]
    for round_ in range(repeats + 3):
        for call, spent in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            if round_ >= 3:
                spent.append(time.process_time() - start)
    return [1e3 * statistics.median(spent) for spent in times]


def relative_error(actual, expected) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def rules(repeats: int) -> None:
    print("  B     T  H   K   V  transformers ms  jetlab ms  ratio     error")
    for B, T, H, K, V in RULES:
        rng = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, T, H, width, generator=rng) for width in (K, K, V))
        a, b = (torch.randn(B, T, H, generator=rng) for _ in range(2))
        tensors = [x.requires_grad_() for x in (q, k, v, -F.softplus(a), torch.sigmoid(b))]

        def both_ways(rule, tensors=tensors, **options):
            o, _ = rule(*tensors, **options)
            return o, *torch.autograd.grad(o.square().sum(), tensors)

        def theirs(run=both_ways):
            return run(torch_chunk_gated_delta_rule, use_qk_l2norm_in_kernel=True, output_final_state=True)

        def ours(run=both_ways):
            return run(gated_delta_rule, qk_l2norm=True)

        error = max(relative_error(x, y) for x, y in zip(ours(), theirs(), strict=True))
        slow, fast = median_ms([theirs, ours], repeats)
        shape = f"{B:3d} {T:5d} {H:2d} {K:3d} {V:3d}"
        print(f"{shape} {slow:16.2f} {fast:10.2f} {slow / fast:6.2f} {error:9.1e}", flush=True)


def others(repeats: int) -> None:
    print("\n  B     T  H   K   V      delta  attention: decay per head, per channel       dplr   (ms)")
    for B, T, H, K, V in RULES:
        rng = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, T, H, width, generator=rng) for width in (K, K, V))
        g, beta = -torch.rand(B, T, H, generator=rng), torch.rand(B, T, H, generator=rng)
        a = F.normalize(k, dim=-1)
        per_channel = g[..., None].expand_as(k)
        calls = []
        for rule, inputs in (
            (gated_delta_rule, (q, a, v, g, beta)),
            (gated_linear_attention, (q, k, v, g)),
            (gated_linear_attention, (q, k, v, per_channel)),
            (dplr_delta_rule, (q, k, v, per_channel, -a, a * beta[..., None])),
        ):
            leaves = [x.detach().contiguous().requires_grad_() for x in inputs]

            def call(rule=rule, leaves=leaves):
                o, _ = rule(*leaves)
                torch.autograd.grad(o.square().sum(), leaves)

            calls.append(call)
        delta, per_head, per_channel_ms, dplr = median_ms(calls, repeats)
        shape = f"{B:3d} {T:5d} {H:2d} {K:3d} {V:3d}"
        print(f"{shape} {delta:10.2f} {per_head:20.2f} {per_channel_ms:12.2f} {dplr:10.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each side (default 30)")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    rules(arguments.repeats)
    others(arguments.repeats)
