"""Specification of the linear-attention blocks: what every token mixer promises, and how JetBlock starts."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from jetlab.layers.init import linear
from jetlab.layers.norm import GatedRMSNorm
from jetlab.layers.projections import project
from jetlab.layers.state import n_bytes, select

DIMS = BlockDims(d_model=24, n_heads=3, head_dim=8, head_dim_v=16)
VARIANTS = [
    pytest.param("gated_deltanet", {}, id="gated_deltanet"),
    pytest.param("jetblock", {}, id="jetblock"),
    pytest.param("jetblock", {"conv_v": "static"}, id="jetblock-static"),
    pytest.param("jetblock", {"conv_v": "none"}, id="jetblock-none"),
    pytest.param(
        "jetblock", {"conv_q": "static", "conv_k": "static", "generator_hidden": 3}, id="jetblock-conv-on-q-and-k"
    ),
    pytest.param("jetblock", {"conv_v": "none", "conv_k": "static"}, id="jetblock-conv-on-k-alone"),
    pytest.param("jetblock", {"conv_q": "dynamic", "conv_k": "dynamic"}, id="jetblock-all-dynamic"),
    pytest.param("jetblock", {"conv_v": "static", "conv_q": "dynamic"}, id="jetblock-dynamic-on-q-alone"),
    pytest.param("jetblock", {"conv_v": "static", "value_branch": True}, id="jetblock-value-branch"),
    pytest.param("jetblock", {"random_start": True}, id="jetblock-random-start"),
    pytest.param("deltanet", {}, id="deltanet"),
    pytest.param("gla", {}, id="gla"),
    pytest.param("gla", {"low_rank": 3}, id="gla-low-rank"),
    pytest.param("mamba2", {}, id="mamba2"),
    pytest.param("mamba2", {"n_groups": "n_heads"}, id="mamba2-a-group-for-each-head"),
    pytest.param("retnet", {}, id="retnet"),
    pytest.param("rwkv7", {}, id="rwkv7"),
    pytest.param("rwkv7", {"first": False, "ranks": (("v", 5), ("g", 3))}, id="rwkv7-behind-the-first"),
]
every_block = pytest.mark.parametrize(("kind", "options"), VARIANTS)
every_block_with_a_query_per_head = pytest.mark.parametrize(
    ("kind", "options"), [variant for variant in VARIANTS if variant.id != "mamba2"]
)


def resolve(options, dims):
    return {name: dims.n_heads if value == "n_heads" else value for name, value in options.items()}


class BehindAFirst(nn.Module):
    """RWKV7 behind the first of its kind, with the interface of one mixer: both see x, and share one value."""

    def __init__(self, dims, **options):
        super().__init__()
        self.first = MIXERS["rwkv7"](dims, ranks=options["ranks"], generator=options.get("generator"))
        self.second = MIXERS["rwkv7"](dims, layer_idx=1, n_layers=2, **options)

    @staticmethod
    def n_params(dims, *, first, ranks):
        both = ({"ranks": ranks}, {"ranks": ranks, "first": first, "layer_idx": 1, "n_layers": 2})
        return sum(MIXERS["rwkv7"].n_params(dims, **options) for options in both)

    def state_bytes(self, seq_len, dtype):
        return self.first.state_bytes(seq_len, dtype) + self.second.state_bytes(seq_len, dtype)

    def forward(self, x, state=None, **options):
        shared = {}
        y, first = self.first(x, None if state is None else state[0], shared=shared, **options)
        z, second = self.second(x, None if state is None else state[1], shared=shared, **options)
        return y + z, (first, second)


def make(kind, options, dims=DIMS, **more):
    """The block as it starts."""
    block = BehindAFirst if options.get("first") is False else MIXERS[kind]
    return block(dims, **resolve(options, dims), **more)


def build(kind, options, dims=DIMS):
    """The block in fp64 with every weight away from its special starting value."""
    rng = torch.Generator().manual_seed(0)
    mixer = make(kind, options, dims, generator=rng).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return mixer


def tokens(B, T, seed=1):
    return torch.randn(B, T, DIMS.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_block
def test_tokens_then_one_more_equal_all_at_once(kind, options):
    mixer, x = build(kind, options), tokens(2, 38)
    expected, _ = mixer(x)
    outputs, state = [], None
    for part in x.split([30, 1, 2, 4, 1], dim=1):
        y, state = mixer(part, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected)


@every_block
def test_padding_on_the_left_changes_nothing_first_or_later(kind, options):
    mixer, x = build(kind, options), tokens(1, 12)
    y1, alone = mixer(x[:, :7])
    y2, _ = mixer(x[:, 7:], alone)
    noise, none, some = tokens(1, 3, seed=2), torch.zeros(1, 3), torch.ones(1, 12)
    p1, state = mixer(torch.cat([noise, x[:, :7]], 1), mask=torch.cat([none, some[:, :7]], 1))
    p2, _ = mixer(torch.cat([noise, x[:, 7:]], 1), state, mask=torch.cat([none, some[:, 7:]], 1))
    torch.testing.assert_close(p1[:, 3:], y1)
    torch.testing.assert_close(p2[:, 3:], y2)


@every_block
def test_padding_on_the_right_leaves_the_state_at_the_last_token(kind, options):
    mixer, x = build(kind, options), tokens(1, 12)
    expected, _ = mixer(x)
    _, state = mixer(torch.cat([x[:, :7], tokens(1, 2, seed=2)], 1), mask=torch.tensor([[1] * 7 + [0] * 2]))
    torch.testing.assert_close(mixer(x[:, 7:], state)[0], expected[:, 7:])


@every_block
def test_a_padded_batch_equals_its_rows_alone(kind, options):
    mixer, lengths = build(kind, options), (9, 4, 1)
    rows = [tokens(1, n, seed=n) for n in lengths]
    batch = torch.cat([torch.cat([torch.ones(1, 9 - x.shape[1], DIMS.d_model).double(), x], 1) for x in rows])
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
    y, state = mixer(batch, mask=mask)
    for i, x in enumerate(rows):
        expected, expected_state = mixer(x)
        torch.testing.assert_close(y[i : i + 1, 9 - lengths[i] :], expected)
        torch.testing.assert_close(select(state, torch.tensor([i])), expected_state)


@every_block
def test_packed_documents_equal_each_document_alone(kind, options):
    mixer, x, ends = build(kind, options), tokens(1, 20), torch.tensor([0, 1, 12, 20])
    y, _ = mixer(x, cu_seqlens=ends)
    for start, end in pairwise(ends):
        torch.testing.assert_close(y[:, start:end], mixer(x[:, start:end])[0])


@every_block
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents_go_on_from_their_own_states(kind, options, dtype):
    mixer, x = build(kind, options), tokens(1, 20)
    _, state = mixer(x[:, :9], cu_seqlens=torch.tensor([0, 2, 9], dtype=dtype))
    y, _ = mixer(x[:, 9:], state, cu_seqlens=torch.tensor([0, 7, 11], dtype=dtype))
    for earlier, later in (((0, 2), (9, 16)), ((2, 9), (16, 20))):
        document = torch.cat([x[:, slice(*earlier)], x[:, slice(*later)]], 1)
        alone, _ = mixer(document)
        torch.testing.assert_close(y[:, later[0] - 9 : later[1] - 9], alone[:, earlier[1] - earlier[0] :])


@every_block
def test_the_future_does_not_change_the_past(kind, options):
    mixer, x = build(kind, options), tokens(1, 20)
    changed = x.clone()
    changed[:, 13:] += 1
    torch.testing.assert_close(mixer(changed)[0][:, :13], mixer(x)[0][:, :13], rtol=0, atol=1e-12)


@every_block
def test_one_context_serves_several_continuations(kind, options):
    mixer, x = build(kind, options), tokens(2, 6)
    _, state = mixer(x)
    rows = torch.tensor([1, 0, 1])
    y, _ = mixer(tokens(3, 2, seed=2), select(state, rows))
    alone, _ = mixer(tokens(3, 2, seed=2)[2:], select(state, torch.tensor([1])))
    torch.testing.assert_close(y[2:], alone)


@every_block
@pytest.mark.parametrize("dims", [DIMS, BlockDims(10, 1, 4, 4, conv_size=3)], ids=["three-heads", "one-head"])
def test_formulas_for_parameters_and_state_equal_what_is_there(kind, options, dims):
    mixer = make(kind, options, dims)
    assert mixer.n_params(dims, **resolve(options, dims)) == sum(p.numel() for p in mixer.parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _, state = mixer.to(dtype)(torch.zeros(2, 9, dims.d_model, dtype=dtype))
        assert 2 * mixer.state_bytes(9, dtype) == n_bytes(state), dtype


@every_block
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float32, 3e-6, id="fp32"),
        pytest.param(torch.bfloat16, 0.05, id="bf16"),  # 8 bits: 0.4 % at each of some ten roundings on the way
    ],
)
def test_fewer_bits_stay_near_fp64_in_outputs_and_keep_their_kind(kind, options, dtype, tolerance):
    mixer, x = build(kind, options), tokens(2, 30)
    expected, _ = mixer(x)
    y, state = mixer.to(dtype)(x[:, :29].to(dtype))
    last, _ = mixer(x[:, 29:].to(dtype), state)
    y = torch.cat([y, last], 1)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


@every_block
def test_a_block_may_be_built_in_half_precision(kind, options):
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = make(kind, options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in mixer.parameters()} == {torch.bfloat16}
    y, _ = mixer(tokens(2, 9).bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_parameters_of_the_released_2b_block_are_met():
    released = BlockDims(d_model=1536, n_heads=12, head_dim=96, head_dim_v=256)
    assert MIXERS["jetblock"].n_params(released) == 23_052_568


@every_block
def test_the_same_generator_gives_the_same_block(kind, options):
    first, second = (make(kind, options, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@every_block
def test_every_weight_learns_within_two_steps(kind, options):
    mixer = make(kind, options, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(mixer.parameters(), lr=1.0)
    learned = set()
    for step in range(2):
        optimizer.zero_grad()
        mixer(tokens(2, 20).float())[0].square().sum().backward()
        learned |= {name for name, p in mixer.named_parameters() if p.grad.abs().max() > 0}
        if step == 0 and getattr(mixer, "dynamic_conv1d", None) is not None and not options.get("random_start"):
            generator = mixer.dynamic_conv1d.kernel_generator
            assert generator.w2.weight.grad.abs().max() > 0
            assert generator.w1.weight.grad.abs().max() == 0  # behind w2 = 0: its turn comes at the second step
        optimizer.step()
    assert learned == {name for name, _ in mixer.named_parameters()}


def test_jetblock_starts_as_the_same_block_with_a_static_convolution():
    dynamic, static = (
        MIXERS["jetblock"](DIMS, conv_v=conv_v, generator=torch.Generator().manual_seed(0))
        for conv_v in ("dynamic", "static")
    )
    static.load_state_dict({name: dynamic.state_dict().get(name, p) for name, p in static.state_dict().items()})
    bias = dynamic.dynamic_conv1d.kernel_generator.w2.bias
    with torch.no_grad():
        static.v_conv.copy_(bias.view_as(static.v_conv))
    x = tokens(2, 20).float()
    torch.testing.assert_close(dynamic(x)[0], static(x)[0])


def test_control_of_the_generator_has_its_parameters_and_starts_as_the_static_block():
    dims = BlockDims(64, 4, 8, 16)
    static = {"conv_v": "static"}
    count = MIXERS["jetblock"].n_params
    assert count(dims, **static, value_branch=True) == count(dims)
    assert count(dims) - count(dims, **static) == 64 * 8 + 4 * 64 * 8
    plain, control = (
        MIXERS["jetblock"](dims, **static, value_branch=branch, generator=torch.Generator().manual_seed(0))
        for branch in (False, True)
    )
    x = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(x)[0], control(x)[0])


def test_random_start_moves_the_kernels_at_once():
    dims = BlockDims(64, 4, 8, 16)
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    for random_start in (False, True):
        block = MIXERS["jetblock"](dims, random_start=random_start, generator=torch.Generator().manual_seed(0))
        spread = block.dynamic_conv1d.kernel_generator(x).std(1).max()
        assert (spread > 0) == random_start


def test_gated_norm_normalises_before_it_gates():
    norm = GatedRMSNorm(4)
    o, z = torch.tensor([[3.0, -3.0, 3.0, -3.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    torch.testing.assert_close(norm(o, z), o / 3 * nn.functional.silu(z))
    assert norm(o.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


def projections(mixer):
    """Weights that act as W_q, W_k, W_v and W_o, under whatever name."""
    if hasattr(mixer, "in_proj"):
        inner, shared = mixer.dims.value_dim, mixer.n_groups * mixer.dims.head_dim
        _, v, k, q, _ = mixer.in_proj.weight.split([inner, inner, shared, shared, mixer.dims.n_heads])
        return q, k, v, mixer.out_proj.weight
    q = mixer.r_proj if hasattr(mixer, "r_proj") else mixer.q_proj
    return tuple(layer.weight for layer in (q, mixer.k_proj, mixer.v_proj, mixer.o_proj))


def assert_equal_up_to_a_factor(mine, theirs):
    ratio = (mine * theirs).sum() / theirs.square().sum()  # projections are scaled
    assert ratio > 0
    torch.testing.assert_close(mine, ratio * theirs, atol=1e-4 * float(mine.detach().abs().max()), rtol=1e-3)


def closest_of_rank(n, matrix):
    u, s, v = torch.linalg.svd(matrix)
    return u[:, :n] @ torch.diag(s[:n]) @ v[:n]  # Eckart-Young: no matrix of this rank is closer


class TestBuiltFromAttention:
    """4 query heads of 6 and 2 key-value heads, as the layer that a block replaces."""

    @staticmethod
    def attention():
        rng = torch.Generator().manual_seed(5)
        layer = nn.Module()
        layer.head_dim = 6
        for name, (n_in, n_out) in {"q": (24, 24), "k": (24, 12), "v": (24, 12), "o": (24, 24)}.items():
            linear = nn.Linear(n_in, n_out)
            nn.init.normal_(linear.weight, generator=rng)
            setattr(layer, f"{name}_proj", linear)
        return layer

    @every_block_with_a_query_per_head
    def test_equal_sizes_compare_and_copy_what_attention_does(self, kind, options):
        attention, dims = self.attention(), BlockDims(d_model=24, n_heads=4, head_dim=6, head_dim_v=6)
        mixer = MIXERS[kind].from_attention(attention, dims, **resolve(options, dims))
        q, k, v, o = projections(mixer)
        for head in range(4):
            rows, shared = slice(6 * head, 6 * head + 6), slice(6 * (head // 2), 6 * (head // 2) + 6)  # 2 heads, 1 key
            assert_equal_up_to_a_factor(
                q[rows].T @ k[rows], attention.q_proj.weight[rows].T @ attention.k_proj.weight[shared]
            )
            assert_equal_up_to_a_factor(
                o[:, rows] @ v[rows], attention.o_proj.weight[:, rows] @ attention.v_proj.weight[shared]
            )

    @every_block_with_a_query_per_head
    def test_smaller_heads_keep_the_largest_components(self, kind, options):
        attention, dims = self.attention(), BlockDims(d_model=24, n_heads=4, head_dim=2, head_dim_v=3)
        q, k, v, o = projections(MIXERS[kind].from_attention(attention, dims, **resolve(options, dims)))
        compared = attention.q_proj.weight[:6].T @ attention.k_proj.weight[:6]
        copied = attention.o_proj.weight[:, :6] @ attention.v_proj.weight[:6]
        assert_equal_up_to_a_factor(q[:2].T @ k[:2], closest_of_rank(2, compared))
        assert_equal_up_to_a_factor(o[:, :3] @ v[:3], closest_of_rank(3, copied))

    def test_heads_that_share_a_source_take_its_components_in_turn(self):
        attention, dims = self.attention(), BlockDims(d_model=24, n_heads=8, head_dim=3, head_dim_v=2)
        q, k, v, o = projections(MIXERS["deltanet"].from_attention(attention, dims))
        compared = attention.q_proj.weight[6:12].T @ attention.k_proj.weight[:6]
        copied = attention.o_proj.weight[:, 6:12] @ attention.v_proj.weight[:6]
        assert_equal_up_to_a_factor(q[6:12].T @ k[6:12], compared)  # two heads of 3 hold all 6
        assert_equal_up_to_a_factor(o[:, 4:8] @ v[4:8], closest_of_rank(4, copied))

    def test_a_query_that_serves_several_heads_compares_what_they_do_together(self):
        attention, dims = self.attention(), BlockDims(d_model=24, n_heads=4, head_dim=5, head_dim_v=6)
        q, k, v, o = projections(MIXERS["mamba2"].from_attention(attention, dims, n_groups=2))
        w_q, w_k = attention.q_proj.weight.view(4, 6, 24), attention.k_proj.weight.view(2, 6, 24)
        for group in range(2):
            rows, heads = slice(5 * group, 5 * group + 5), (2 * group, 2 * group + 1)
            together = sum(w_q[head].T @ w_k[head // 2] for head in heads)
            assert_equal_up_to_a_factor(q[rows].T @ k[rows], closest_of_rank(5, together))
        for head in range(4):
            rows, shared = slice(6 * head, 6 * head + 6), slice(6 * (head // 2), 6 * (head // 2) + 6)
            assert_equal_up_to_a_factor(
                o[:, rows] @ v[rows], attention.o_proj.weight[:, rows] @ attention.v_proj.weight[shared]
            )

    @every_block
    def test_outputs_start_small_at_every_size(self, kind, options):
        x = tokens(2, 30).float()
        for dims in (DIMS, BlockDims(d_model=24, n_heads=4, head_dim=6, head_dim_v=6)):
            generator = torch.Generator().manual_seed(0)
            mixer = MIXERS[kind].from_attention(self.attention(), dims, generator=generator, **resolve(options, dims))
            y, _ = mixer(x)
            assert 1e-3 < y.square().mean().sqrt() < 0.2  # the stream it is added to is of order 1

    def test_a_wrapped_attention_is_looked_into(self):
        wrapper = nn.Module()
        wrapper.inner = self.attention()
        plain, wrapped = (
            MIXERS["jetblock"].from_attention(a, BlockDims(24, 4, 6, 6), generator=torch.Generator().manual_seed(0))
            for a in (wrapper.inner, wrapper)
        )
        assert torch.equal(plain.q_proj.weight, wrapped.q_proj.weight)


@pytest.mark.parametrize("d_model", [24, 1536], ids=["laid-together", "each-alone"])
def test_projections_are_those_of_each_layer(d_model):
    generator = torch.Generator().manual_seed(0)
    a, b, c = (linear(d_model, n, generator).double() for n in (100, 50, 30))
    x = torch.randn(2, 3, d_model, generator=generator, dtype=torch.float64)
    first, second = project(x, (a, b), (c,))
    torch.testing.assert_close(first, torch.cat([a(x), b(x)], -1))
    torch.testing.assert_close(second, c(x))


@every_block
def test_an_adapter_in_place_of_a_projection_is_used(kind, options):
    mixer, x = build(kind, options), tokens(1, 5)
    before, _ = mixer(x)

    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.out_features = inner, inner.weight, inner.out_features

        def forward(self, x):
            return 0.5 * self.inner(x)

    name, owner = {"mamba2": "in_proj"}.get(kind, "v_proj"), getattr(mixer, "second", mixer)
    setattr(owner, name, Halved(getattr(owner, name)))
    assert not torch.allclose(mixer(x)[0], before)


@every_block
def test_what_stands_at_padding_is_not_read(kind, options):
    mixer, x = build(kind, options), tokens(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :3] = mask[1, 6:] = 0
    y, _ = mixer(x, mask=mask)
    x[mask == 0] = torch.nan
    after, _ = mixer(x, mask=mask)
    torch.testing.assert_close(after[mask == 1], y[mask == 1], rtol=0, atol=0)


@every_block
@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((9, 24), {}, r"x must be \[B, T, D\] with T ≥ 1 and D = 24, got \[9, 24\]; a single token is"),
        ((2, 0, 24), {}, r"x must be .* got \[2, 0, 24\]"),
        ((2, 9, 20), {}, r"x must be .* D = 24, got \[2, 9, 20\]"),
        ((2, 9, 24), {"mask": torch.ones(1, 9)}, r"mask must be \[B, T\] = \[2, 9\], got \[1, 9\]; give 1 for tokens"),
        ((1, 4, 24), {"mask": torch.ones(1, 4), "cu_seqlens": torch.tensor([0, 4])}, r"got both cu_seqlens and mask"),
    ],
    ids=["rows-of-tokens", "no-token", "another-width", "mask-of-another-batch", "packed-and-padded"],
)
def test_an_input_that_does_not_fit_is_refused(kind, options, shape, given, message):
    with pytest.raises(ValueError, match=message):
        build(kind, options)(torch.zeros(shape, dtype=torch.float64), **given)


def test_a_jetblock_refuses_the_state_of_one_with_other_convolutions():
    _, state = build("jetblock", {"conv_v": "none"})(tokens(1, 5))
    with pytest.raises(
        ValueError, match=r"state must come from a JetBlock with as many convolutions, 1, got one with 0"
    ):
        build("jetblock", {})(tokens(1, 5), state)


def test_a_bias_of_a_projection_is_used():
    mixer, x = build("gla", {}), tokens(1, 5)
    before, _ = mixer(x)
    mixer.v_proj.bias = nn.Parameter(torch.ones(mixer.v_proj.out_features, dtype=torch.float64))
    assert not torch.allclose(mixer(x)[0], before)


@every_block
def test_who_listens_to_a_layer_inside_hears_it(kind, options):
    mixer, heard = build(kind, options), set()
    named = {name: layer for name, layer in mixer.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in named.items():
        layer.register_forward_hook(lambda _layer, _x, _y, name=name: heard.add(name))
    mixer(tokens(2, 40))
    assert heard == set(named)


def test_an_unknown_kind_is_answered_with_the_known_ones():
    with pytest.raises(KeyError) as error:
        MIXERS["jet_block"]
    known = "attention, sliding_attention, jetblock, gated_deltanet, deltanet, gla, mamba2, retnet, rwkv7"
    assert f"must be one of {known}, got 'jet_block'; closest is 'jetblock'" in str(error.value)
    assert "jetblock" in MIXERS
    assert "jet_block" not in MIXERS


def test_looking_up_one_kind_imports_no_other():
    code = "import sys; from jetlab.layers import MIXERS; MIXERS['gla'], len(MIXERS), 'rwkv7' in MIXERS; "
    code += "print(*sorted(name for name in sys.modules if name.removeprefix('jetlab.layers.') in MIXERS))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["jetlab.layers.gla"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("jetblock", {"conv_k": "full"}, r"conv_k must be one of none, static, dynamic, got 'full'"),
        ("jetblock", {"value_branch": True}, r"value_branch is the control beside conv_v='static', got 'dynamic'"),
        ("jetblock", {"conv_v": "full"}, r"conv_v must be one of none, static, dynamic, got 'full'"),
        ("jetblock", {"generator_hidden": 0}, r"generator_hidden must be at least 1, got 0; use conv_v='static'"),
        ("gla", {"low_rank": 0}, r"low_rank must be at least 1, got 0; the published block has 16"),
        ("mamba2", {"n_groups": 2}, r"n_groups must divide n_heads, got 2 and 3; use n_groups=1"),
        ("mamba2", {"n_groups": 0}, r"n_groups must divide n_heads, got 0 and 3"),
        (
            "rwkv7",
            {"layer_idx": 3, "n_layers": 3},
            r"layer_idx must be 0 … n_layers - 1, got 3 of 3; count layers from 0",
        ),
        ("rwkv7", {"ranks": (("k", 4),)}, r"ranks must be pairs of w, a, v or g and a number ≥ 1, got 'k': 4"),
        ("rwkv7", {"ranks": (("g", 0),)}, r"ranks must be pairs .* got 'g': 0"),
    ],
)
def test_an_option_that_cannot_be_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        MIXERS[kind](DIMS, **options)


def test_retention_refuses_a_width_that_has_no_pairs():
    with pytest.raises(ValueError, match=r"head_dim must be even, .* got 7; use 8"):
        MIXERS["retnet"](BlockDims(d_model=24, n_heads=3, head_dim=7, head_dim_v=16))


def test_dimensions_must_be_whole_and_positive():
    with pytest.raises(ValueError, match=r"head_dim_v must be a whole number ≥ 1, got 42\.6"):
        BlockDims(d_model=24, n_heads=3, head_dim=8, head_dim_v=42.6)
