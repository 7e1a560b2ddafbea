"""Specification of the published blocks by their equations: loops over tokens and heads, in fp64, with none of our operations.

Each loop is written for one sequence x [T, D] and reads the block's own weights.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from jetlab.layers.rwkv7 import default_ranks

DIMS = BlockDims(d_model=20, n_heads=4, head_dim=6, head_dim_v=10, conv_size=4)
H, K, V, D = DIMS.n_heads, DIMS.head_dim, DIMS.head_dim_v, DIMS.d_model


def build(kind, **options):
    """The block in fp64 with every weight away from its special starting value."""
    rng = torch.Generator().manual_seed(7)
    mixer = MIXERS[kind](DIMS, generator=rng, **options).double().requires_grad_(False)
    for p in mixer.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return mixer


def tokens(T=23, seed=1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def silu(x):
    return x / (1 + torch.exp(-x))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def rms(x):
    return x / torch.sqrt((x * x).mean() + 1e-5)


def convolved(x, weight, bias=0.0):
    """SiLU of each channel's weighted window; the last tap meets the current token."""
    T, W = len(x), weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(T):
        for j in range(W):
            if t - W + 1 + j >= 0:
                y[t] += weight[:, j] * x[t - W + 1 + j]
    return silu(y + bias)


def unit(x):
    return x / torch.sqrt((x * x).sum() + 1e-6)


def head(x, h, width):
    return x[..., h * width : (h + 1) * width]


def test_deltanet_corrects_what_a_unit_key_holds():
    mixer, x = build("deltanet"), tokens()
    projected = torch.cat([x @ layer.weight.T for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)], 1)
    q, k, v = convolved(projected, mixer.conv).split([H * K, H * K, H * V], 1)
    beta = sigmoid(x @ mixer.b_proj.weight.T)
    o = torch.zeros(len(x), H * V, dtype=x.dtype)
    for h in range(H):
        S = torch.zeros(K, V, dtype=x.dtype)
        for t in range(len(x)):
            key = unit(head(k[t], h, K))
            S = S + beta[t, h] * torch.outer(key, head(v[t], h, V) - S.T @ key)
            head(o[t], h, V)[:] = rms(S.T @ unit(head(q[t], h, K)) / math.sqrt(K)) * mixer.o_norm.weight
    torch.testing.assert_close(mixer(x[None])[0][0], o @ mixer.o_proj.weight.T, rtol=1e-9, atol=1e-9)


def test_gated_deltanet_fades_first_and_then_corrects():
    mixer, x = build("gated_deltanet"), tokens()
    projected = torch.cat([x @ layer.weight.T for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj)], 1)
    q, k, v = convolved(projected, mixer.conv).split([H * K, H * K, H * V], 1)
    z, a, b = (x @ layer.weight.T for layer in (mixer.g_proj, mixer.a_proj, mixer.b_proj))
    fade = torch.exp(-torch.exp(mixer.A_log) * torch.log1p(torch.exp(a + mixer.dt_bias)))
    o = torch.zeros(len(x), H * V, dtype=x.dtype)
    for h in range(H):
        S = torch.zeros(K, V, dtype=x.dtype)
        for t in range(len(x)):
            key, S = unit(head(k[t], h, K)), fade[t, h] * S
            S = S + sigmoid(b[t, h]) * torch.outer(key, head(v[t], h, V) - S.T @ key)
            read = S.T @ unit(head(q[t], h, K)) / math.sqrt(K)
            head(o[t], h, V)[:] = rms(read) * mixer.o_norm.weight * silu(head(z[t], h, V))
    torch.testing.assert_close(mixer(x[None])[0][0], o @ mixer.o_proj.weight.T, rtol=1e-9, atol=1e-9)


def test_gla_fades_every_key_channel_by_a_gate_of_its_own():
    mixer, x = build("gla"), tokens()
    q, k, v, z = (x @ layer.weight.T for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj))
    fade = sigmoid(x @ mixer.gk_proj[0].weight.T @ mixer.gk_proj[1].weight.T + mixer.gk_proj[1].bias) ** (1 / 16)
    o = torch.zeros(len(x), H * V, dtype=x.dtype)
    for h in range(H):
        S = torch.zeros(K, V, dtype=x.dtype)
        for t in range(len(x)):
            S = head(fade[t], h, K)[:, None] * S + torch.outer(head(k[t], h, K), head(v[t], h, V))
            read = S.T @ head(q[t], h, K) / math.sqrt(K)
            head(o[t], h, V)[:] = rms(read) * mixer.o_norm.weight * silu(head(z[t], h, V))
    torch.testing.assert_close(mixer(x[None])[0][0], o @ mixer.o_proj.weight.T, rtol=1e-9, atol=1e-9)


def turned(x, t):
    """Channels i and i + K/2 turned by t · 10000^(-2i/K), written with complex numbers."""
    half = len(x) // 2
    speed = torch.tensor([10000.0 ** (-2 * i / len(x)) for i in range(half)], dtype=x.dtype)
    pair = torch.complex(x[:half], x[half:]) * torch.exp(1j * t * speed)
    return torch.cat([pair.real, pair.imag])


@pytest.mark.parametrize("offset", [0, 1000])
def test_retnet_is_attention_that_fades_with_distance_in_place_of_a_softmax(offset):
    mixer, x = build("retnet"), tokens()
    q, k, v, z = (x @ layer.weight.T for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj))
    o = torch.zeros(len(x), H * V, dtype=x.dtype)
    for h in range(H):
        for t in range(len(x)):
            read = torch.zeros(V, dtype=x.dtype)
            for s in range(t + 1):
                score = turned(head(q[t], h, K), t) @ turned(head(k[s], h, K), s) / math.sqrt(K)
                read += (1 - 2.0 ** (-5 - h)) ** (t - s) * score * head(v[s], h, V)
            head(o[t], h, V)[:] = rms(read) * mixer.o_norm.weight * silu(head(z[t], h, V))
    y, _ = mixer(x[None], positions=torch.arange(offset, offset + len(x))[None])
    torch.testing.assert_close(y[0], o @ mixer.o_proj.weight.T, rtol=1e-9, atol=1e-9)


def test_retnet_goes_on_from_positions_that_it_was_given():
    mixer, x = build("retnet"), tokens()[None]
    expected, _ = mixer(x)
    first, state = mixer(x[:, :20], positions=torch.arange(100, 120)[None])
    torch.testing.assert_close(torch.cat([first, mixer(x[:, 20:], state)[0]], 1), expected)
    assert state.position.tolist() == [120]


@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_mamba2_steps_by_delta_gates_first_and_norms_over_a_group(n_groups):
    mixer, x, inner = build("mamba2", n_groups=n_groups), tokens(), H * V
    parts = (x @ mixer.in_proj.weight.T).split([inner, inner + 2 * n_groups * K, H], 1)
    z, step = parts[0], torch.log(1 + torch.exp(parts[2] + mixer.dt_bias))
    v, b, c = convolved(parts[1], mixer.conv1d.weight[:, 0], mixer.conv1d.bias).split(
        [inner, n_groups * K, n_groups * K], 1
    )
    o = torch.zeros(len(x), inner, dtype=x.dtype)
    for h in range(H):
        S, group = torch.zeros(K, V, dtype=x.dtype), h * n_groups // H
        for t in range(len(x)):
            S = torch.exp(-step[t, h] * torch.exp(mixer.A_log[h])) * S
            S = S + step[t, h] * torch.outer(head(b[t], group, K), head(v[t], h, V))
            head(o[t], h, V)[:] = S.T @ head(c[t], group, K) + mixer.D[h] * head(v[t], h, V)
    gated = o * silu(z)
    for t in range(len(x)):
        for group in range(n_groups):
            head(gated[t], group, inner // n_groups)[:] = rms(head(gated[t], group, inner // n_groups))
    y = (gated * mixer.norm.weight) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x[None])[0][0], y, rtol=1e-9, atol=1e-9)


def test_mamba2_computes_what_transformers_does_with_the_same_weights():
    config = Mamba2Config(
        hidden_size=D,
        num_heads=H,
        head_dim=V,
        state_size=K,
        expand=H * V // D,
        n_groups=1,  # with more of them its versions disagree about the norm
        conv_kernel=4,
        chunk_size=8,
        num_hidden_layers=1,
        vocab_size=8,
    )
    theirs = Mamba2Mixer(config, layer_idx=0).requires_grad_(False)
    rng = torch.Generator().manual_seed(2)
    for p in theirs.parameters():
        p.copy_(0.4 * torch.randn(p.shape, generator=rng))
    mine = MIXERS["mamba2"](DIMS).requires_grad_(False)
    mine.load_state_dict(theirs.state_dict())
    x = tokens(45).float().view(1, 45, D)
    torch.testing.assert_close(mine(x)[0], theirs(x), rtol=1e-4, atol=1e-5)  # fp32: another order of sums


def mix(layer, x, v_first):
    """RWKV7's output and its own v, before it is mixed with `v_first` (None in the first layer)."""

    def low_rank(maps, x, act):
        y = act(x @ maps.w1.weight.T) @ maps.w2.weight.T
        return y if maps.w2.bias is None else y + maps.w2.bias

    previous = torch.cat([torch.zeros(1, D, dtype=x.dtype), x[:-1]])
    x_r, x_w, x_k, x_v, x_a, x_g = (x + (previous - x) * mu for mu in layer.mu)
    r, k, own = x_r @ layer.r_proj.weight.T, x_k @ layer.k_proj.weight.T, x_v @ layer.v_proj.weight.T
    v = own if v_first is None else own + (v_first - own) * sigmoid(low_rank(layer.v_lora, x_v, lambda y: y))
    w = torch.exp(-math.exp(-0.5) * sigmoid(low_rank(layer.w_lora, x_w, torch.tanh)))
    a = sigmoid(low_rank(layer.a_lora, x_a, lambda y: y))
    gate = low_rank(layer.g_lora, x_g, sigmoid)
    out = torch.zeros_like(v)
    for h in range(H):
        S, norm = torch.zeros(K, V, dtype=x.dtype), layer.o_norm
        for t in range(len(x)):
            kappa = head(k[t] * layer.k_k, h, K)
            kappa = kappa / kappa.norm()
            key = head(k[t] * (1 + (a[t] - 1) * layer.k_a), h, K)
            removed = torch.outer(head(a[t], h, K) * kappa, kappa @ S)  # read before the decay
            S = head(w[t], h, K)[:, None] * S - removed + torch.outer(key, head(v[t], h, V))
            o = S.T @ head(r[t], h, K)
            o = (o - o.mean()) / torch.sqrt(o.var(correction=0) + V * 1e-5)
            o = o * head(norm.weight, h, V) + head(norm.bias, h, V)
            head(out[t], h, V)[:] = o + (head(r[t], h, K) * key * layer.r_k[h]).sum() * head(v[t], h, V)
    return (out * gate) @ layer.o_proj.weight.T, own


def test_rwkv7_removes_by_one_gate_writes_by_another_and_mixes_in_the_first_value():
    first = build("rwkv7", layer_idx=1, n_layers=6)
    second = build("rwkv7", layer_idx=4, n_layers=6, first=False)
    x, x_later, shared = tokens(), tokens(seed=2), {}
    expected, v_first = mix(first, x, None)
    torch.testing.assert_close(first(x[None], shared=shared)[0][0], expected, rtol=1e-9, atol=1e-9)
    expected, own = mix(second, x_later, v_first)
    torch.testing.assert_close(second(x_later[None], shared=shared)[0][0], expected, rtol=1e-9, atol=1e-9)
    alone, _ = mix(second, x_later, own)  # mixing a value with itself changes nothing
    torch.testing.assert_close(second(x_later[None], shared={})[0][0], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(second(x_later[None])[0][0], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", [True, False], ids=["first", "first-to-run"])
def test_gradient_checkpointing_changes_no_gradient_of_rwkv7_layers(first):
    layers = [build("rwkv7", first=first), build("rwkv7", layer_idx=1, n_layers=2, first=False)]

    def gradients(call):
        x, shared = tokens()[None], {}
        for layer in layers:
            layer.requires_grad_(True).zero_grad()
            x = call(lambda x, layer=layer, shared=shared: x + layer(x, shared=shared)[0], x)
        x.square().sum().backward()
        return [p.grad for layer in layers for p in layer.parameters()]

    plain, recomputed = gradients(lambda f, x: f(x)), gradients(lambda f, x: checkpoint(f, x, use_reentrant=False))
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_an_rwkv7_layer_that_becomes_the_first_computes_what_it_did_as_the_first_to_run():
    layer, x = build("rwkv7", first=False), tokens()[None]
    expected, _ = layer(x, shared={})
    layer.become_first()
    torch.testing.assert_close(layer(x, shared={})[0], expected, rtol=0, atol=0)
    assert MIXERS["rwkv7"].n_params(DIMS) == sum(p.numel() for p in layer.parameters())


def test_rwkv7_starts_where_the_published_one_does():
    layer_idx, n_layers = 2, 5
    dims = BlockDims(d_model=12, n_heads=3, head_dim=4, head_dim_v=4)
    mixer = MIXERS["rwkv7"](dims, layer_idx=layer_idx, n_layers=n_layers, first=False)
    depth, left = layer_idx / (n_layers - 1), 1 - layer_idx / n_layers
    for n in range(12):
        for row, power in enumerate((0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):  # r, w, k, v, a, g
            assert mixer.mu[row, n].item() == pytest.approx(1 - (n / 12) ** (power * left), abs=1e-6)
        z, linear = 2 * (n % 4) / 3 - 1, n / 11 - 0.5
        decay = -6 + 6 * (n / 11) ** (1 + depth**0.3) + 0.5 + 2.5 * z * abs(z)
        assert mixer.w_lora.w2.bias[n].item() == pytest.approx(decay, abs=1e-5)
        assert mixer.a_lora.w2.bias[n].item() == pytest.approx(-0.19 + 0.3 * z * abs(z) + 0.4 * linear, abs=1e-6)
        assert mixer.v_lora.w2.bias[n].item() == pytest.approx(0.73 - 0.4 * linear, abs=1e-6)
        assert mixer.k_k[n].item() == pytest.approx(0.71 - 0.1 * linear, abs=1e-6)
    assert (mixer.k_a == 1.02).all() and (mixer.r_k == -0.04).all()
    assert mixer.o_norm.eps == pytest.approx(4e-5) and mixer.o_norm.weight[0].item() == pytest.approx(0.6**0.7)
    for maps in (mixer.w_lora, mixer.a_lora, mixer.v_lora, mixer.g_lora):
        assert (maps.w1.weight == 0).all()
        gram = maps.w2.weight @ maps.w2.weight.T  # 32 units, 12 channels
        torch.testing.assert_close(gram, 0.01 * torch.eye(12), atol=1e-6, rtol=0)
    for projection, gain in ((mixer.r_proj, 1.0), (mixer.k_proj, 0.1), (mixer.v_proj, 1.0)):
        gram = projection.weight @ projection.weight.T
        torch.testing.assert_close(gram, gain**2 * torch.eye(12), atol=1e-5, rtol=0)


def test_mamba2_starts_with_the_published_decays():
    mixer = MIXERS["mamba2"](BlockDims(d_model=4, n_heads=500, head_dim=2, head_dim_v=1))
    rate, step = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= rate.min() < 1.5 and 15.5 < rate.max() <= 16
    assert 0.99e-3 < step.min() < 1.2e-3 and 0.8e-1 < step.max() < 1.01e-1
    assert (mixer.D == 1).all() and (mixer.conv1d.bias == 0).all()


@pytest.mark.parametrize(
    ("kind", "dims", "options", "expected"),
    [
        pytest.param("retnet", (512, 8, 64, 128), {}, 8 * 512**2 + 128, id="retnet-at-its-defaults"),
        pytest.param("gla", (512, 4, 64, 128), {}, 4 * 512**2 + 16 * (512 + 256) + 256 + 128, id="gla-at-its-defaults"),
        pytest.param(
            "deltanet", (512, 4, 128, 128), {}, 4 * 512**2 + 512 * 4 + 4 * 3 * 512 + 128, id="deltanet-at-its-defaults"
        ),
        pytest.param(
            "mamba2",
            (512, 16, 128, 64),  # I = 1024, N = 128
            {},
            512 * (2 * 1024 + 2 * 128 + 16) + 5 * (1024 + 2 * 128) + 3 * 16 + 1024 + 1024 * 512,
            id="mamba2-at-its-defaults",
        ),
        pytest.param(
            "rwkv7",
            (1536, 24, 64, 64),
            {"first": False},
            4 * 1536**2 + 11 * 1536 + 2 * 1536 * (96 + 96 + 64 + 192) + 3 * 1536,
            id="rwkv7-at-width-1536",
        ),
    ],
)
def test_parameters_equal_the_published_counts(kind, dims, options, expected):
    dims = BlockDims(*dims)
    assert MIXERS[kind].n_params(dims, **options) == expected
    with torch.device("meta"):
        assert sum(p.numel() for p in MIXERS[kind](dims, **options).parameters()) == expected


def test_rwkv7_sizes_its_maps_as_published():
    assert default_ranks(BlockDims(1536, 24, 64, 64)) == {"w": 96, "a": 96, "v": 64, "g": 192}
    assert default_ranks(BlockDims(64, 4, 16, 16)) == {"w": 32, "a": 32, "v": 32, "g": 32}


def test_one_head_of_one_value_is_a_block_too():
    for kind in ("deltanet", "gla", "mamba2", "retnet", "rwkv7"):
        mixer = MIXERS[kind](BlockDims(d_model=3, n_heads=1, head_dim=2, head_dim_v=1, conv_size=1))
        assert isinstance(mixer, nn.Module) and mixer(torch.randn(2, 5, 3))[0].isfinite().all()
