"""Jet-Nemotron-2B with random weights on one GPU: what must be equal is equal, then how fast Transformers decodes it.

    python records/h100/hf/check.py --out OUT --commit "$(git rev-parse HEAD)"

1. Every recurrence on the GPU in fp32: chunked against the token-by-token form in fp64, outputs and gradients.
2. A small hybrid of every kind of layer in fp64: forward, static cache, left padding on the GPU equal to the CPU.
3. The 2B shape in bf16: parameters, prefill and greedy decoding, call by call as Transformers' own generate does it:
   speed (least of three) and memory. Up to a batch of 128 the calls of small operations take longer than the GPU does.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

import jetlab.hf
from jetlab.layers import MIXERS
from jetlab.models import zoo
from jetlab.ops import dplr_delta_rule, gated_delta_rule, gated_linear_attention

DEVICE = "cuda"


def relative_error(actual, expected):
    return ((actual.cpu().double() - expected.cpu().double()).abs().max() / expected.abs().max().cpu()).item()


def recurrences() -> dict[str, float]:
    """Largest relative error of outputs and gradients at T = 257, K = 96, V = 128, with resets of -80."""
    rng = torch.Generator().manual_seed(0)
    B, T, H, K, V = 2, 257, 3, 96, 128

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k, v = normal(B, T, H, K), 0.5 * F.normalize(normal(B, T, H, K), dim=-1), normal(B, T, H, V)
    per_head, per_channel = -F.softplus(normal(B, T, H)), -F.softplus(normal(B, T, H, K))
    per_head[:, ::8] = per_channel[:, ::8] = -80.0
    direction = F.normalize(normal(B, T, H, K), dim=-1)
    cases = {
        "gated_linear_attention_per_head": (gated_linear_attention, (q, k, v, per_head)),
        "gated_linear_attention_per_channel": (gated_linear_attention, (q, k, v, per_channel)),
        "gated_delta_rule": (gated_delta_rule, (q, k, v, per_head, per_head.exp())),
        "dplr_delta_rule": (
            dplr_delta_rule,
            (q, k, v, per_channel, -direction, direction * normal(B, T, H, K).sigmoid()),
        ),
    }
    errors = {}
    for name, (op, inputs) in cases.items():
        found = []
        for backend, dtype in (("reference", torch.float64), ("chunked", torch.float32)):
            leaves = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
            o, state = op(*leaves, backend=backend)
            found.append((o, state, *torch.autograd.grad(o.square().sum() + state.square().sum(), leaves)))
        errors[f"error_{name}"] = max(relative_error(a, b) for b, a in zip(*found, strict=True))
    return errors


def small_hybrid() -> dict[str, float]:
    """Largest difference between GPU and CPU over a hybrid that holds every kind of layer, in fp64."""
    linear = [kind for kind in MIXERS if "attention" not in kind]
    section = {"num_heads": 2, "head_dim": 8, "head_dim_v": 16}
    config = jetlab.hf.JetNemotronConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(linear) + 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_kinds=[*linear, "attention", "sliding_attention"],
        efficient_attention_config={kind: section for kind in linear} | {"sliding_attention": {"window_size": 6}},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = jetlab.hf.JetNemotronForCausalLM(config).double().eval()
    ids = torch.randint(1, 64, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    found = {}
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        text = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        model = model.to(DEVICE)
        ids, mask = ids.to(DEVICE), mask.to(DEVICE)
        actual = model(ids, attention_mask=mask).logits
        found["error_hybrid_on_gpu"] = (actual.cpu() - expected)[mask.bool().cpu()].abs().max().item()
        options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        for cache, compiled in (("dynamic", False), ("static", False), ("static", True)):
            generated = model.generate(ids, cache_implementation=cache, disable_compile=not compiled, **options)
            name = f"tokens_differ_{cache}_cache" + "_compiled" * compiled
            found[name] = int((generated.cpu() != text).sum())
    return found


def timed(call, repeats: int = 3) -> float:
    """Seconds, the least of `repeats`."""
    spent = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent)


@torch.no_grad()
def speed() -> dict[str, float]:
    """Prefill of 4 × 4096 tokens and decoding behind 4096 tokens, with plain PyTorch mixers and Transformers' generate."""
    torch.manual_seed(0)
    model = zoo.build("Jet-Nemotron-2B", DEVICE, torch.bfloat16)
    found = {"n_params": sum(p.numel() for p in model.parameters())}
    ids = torch.randint(1, 150000, (4, 4096), device=DEVICE)
    model(ids, logits_to_keep=1)
    found["prefill_4x4096_ms"] = 1e3 * timed(lambda: model(ids, logits_to_keep=1))
    for batch in (1, 32, 128):
        torch.cuda.reset_peak_memory_stats()
        cache = jetlab.hf.JetNemotronCache(model.config)
        for part in torch.randint(1, 150000, (batch, 4096), device=DEVICE).split(512, dim=1):
            out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)

        def step(cache=cache, token=token):
            for _ in range(8):
                model(token, past_key_values=cache, use_cache=True)

        step()
        found[f"decode_4k_batch_{batch}_ms"] = 1e3 * timed(step) / 8
        found[f"decode_4k_batch_{batch}_tokens_per_s"] = batch / found[f"decode_4k_batch_{batch}_ms"] * 1e3
        found[f"peak_4k_batch_{batch}_gib"] = torch.cuda.max_memory_allocated() / 2**30
        del cache, out, token
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--commit", required=True, help="commit that is checked, for environment.json")
    arguments = parser.parse_args()
    out = arguments.out
    torch.backends.cuda.matmul.allow_tf32 = False
    metrics = recurrences() | small_hybrid() | speed()
    environment = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "devices": [torch.cuda.get_device_name()],
        "source_commit": arguments.commit,
    }
    out.mkdir(parents=True, exist_ok=True)
    rounded = {name: x if isinstance(x, int) else float(f"{x:.4g}") for name, x in sorted(metrics.items())}
    for name, content in (("metrics", rounded), ("environment", environment)):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
