"""What every recurrence promises: the chunked form is the definition, whatever the length, the decay and the precision."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from jetlab.ops import (
    dplr_delta_rule,
    dplr_delta_rule_chunked,
    dplr_delta_rule_reference,
    gated_delta_rule,
    gated_delta_rule_chunked,
    gated_delta_rule_reference,
    gated_linear_attention,
    gated_linear_attention_chunked,
    gated_linear_attention_reference,
    resolve_backend,
)
from jetlab.ops.packing import check_documents, once


@dataclass(frozen=True)
class Rule:
    """One recurrence in its three forms; `gates` names what follows q, k, v, with the letters of its shape."""

    op: object
    chunked: object
    reference: object
    gates: dict[str, str | None]


ATTENTION = (gated_linear_attention, gated_linear_attention_chunked, gated_linear_attention_reference)
DELTA = (gated_delta_rule, gated_delta_rule_chunked, gated_delta_rule_reference)
DPLR = (dplr_delta_rule, dplr_delta_rule_chunked, dplr_delta_rule_reference)
RULES = {
    "linear-attention": Rule(*ATTENTION, {"g": None}),
    "linear-attention-decay-per-head": Rule(*ATTENTION, {"g": "BTH"}),
    "linear-attention-decay-per-channel": Rule(*ATTENTION, {"g": "BTHK"}),
    "delta": Rule(*DELTA, {"g": None, "beta": "BTH"}),
    "gated-delta": Rule(*DELTA, {"g": "BTH", "beta": "BTH"}),
    "dplr": Rule(*DPLR, {"g": "BTHK", "a": "BTHK", "b": "BTHK"}),
    "dplr-without-decay": Rule(*DPLR, {"g": None, "a": "BTHK", "b": "BTHK"}),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
decaying = pytest.mark.parametrize(
    "rule", [r for r in RULES.values() if r.gates["g"]], ids=[n for n, r in RULES.items() if r.gates["g"]]
)


def inputs(rule, B, T, H, K, V, dtype=torch.float64, seed=0):
    """q, k, v, the gates of `rule` and a state, by name; keys have length about one half, corrections are contractions."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tensors = {"q": normal(B, T, H, K), "k": 0.5 * F.normalize(normal(B, T, H, K), dim=-1), "v": normal(B, T, H, V)}
    direction = F.normalize(normal(B, T, H, K), dim=-1)
    for name, letters in rule.gates.items():
        raw = normal(*({"B": B, "T": T, "H": H, "K": K}[letter] for letter in letters or "BTH"))
        made = {"g": lambda raw: -F.softplus(raw), "beta": torch.sigmoid, "a": lambda _: -direction}
        made["b"] = lambda raw: direction * raw.sigmoid()
        tensors[name] = made[name](raw) if letters else None
    tensors["state"] = normal(B, H, K, V)
    return {name: x if x is None else x.to(dtype) for name, x in tensors.items()}


def run(form, tensors, **options):
    """Call with q, k, v and gates in their order, and the state by its name."""
    tensors = dict(tensors)
    state = tensors.pop("state", None)
    return form(*tensors.values(), state=state, **options)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def values_and_gradients(form, tensors, **options):
    """Outputs and the gradient of a fixed functional of them for every input."""
    leaves = {name: x if x is None else x.detach().clone().requires_grad_() for name, x in tensors.items()}
    o, final = run(form, leaves, **options)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x) for x in (o, final)]
    wanted = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad((o * weights[0]).sum() + (final * weights[1]).sum(), list(wanted.values()))
    return {"o": o, "final": final} | {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}


@every_rule
@pytest.mark.parametrize("T", [1, 63, 64, 65, 257])
@pytest.mark.parametrize("with_state", [False, True], ids=["from-zero", "from-state"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(torch.float64, 1e-9, id="fp64"),
        pytest.param(torch.float32, 3e-5, id="fp32"),  # only the order of sums differs
        pytest.param(torch.bfloat16, 1e-2, id="bf16"),  # inputs are shared; the output is rounded to 8 bits
    ],
)
def test_chunked_form_equals_the_recurrence(rule, T, with_state, dtype, tolerance):
    tensors = inputs(rule, 2, T, 3, 24, 40, dtype)
    if not with_state:
        tensors["state"] = None
    exact = {name: x if x is None else x.double() for name, x in tensors.items()}
    expected, expected_state = run(rule.reference, exact)
    actual, actual_state = run(rule.op, tensors, backend="chunked")
    assert actual.dtype == dtype
    assert actual_state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative_error(actual, expected) <= tolerance
    assert relative_error(actual_state, expected_state) <= min(tolerance, 3e-5)


@every_rule
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 32, 64, 100])
def test_chunk_size_changes_nothing(rule, chunk_size):
    tensors = inputs(rule, 1, 90, 2, 8, 6)
    expected, _ = run(rule.reference, tensors)
    actual, _ = run(rule.op, tensors, chunk_size=chunk_size)
    assert relative_error(actual, expected) <= 1e-9


@every_rule
@pytest.mark.parametrize("T", [1, 2, 33, 65])
@pytest.mark.parametrize("qk_l2norm", [False, True], ids=["plain", "l2norm"])
def test_gradients_of_every_input_equal_those_of_the_recurrence(rule, T, qk_l2norm):
    tensors = inputs(rule, 2, T, 2, 24, 40)
    expected = values_and_gradients(rule.reference, tensors, qk_l2norm=qk_l2norm)
    actual = values_and_gradients(rule.chunked, tensors, qk_l2norm=qk_l2norm)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-9, name


@every_rule
@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_gradients_pass_gradcheck(rule, form):
    tensors = {name: x for name, x in inputs(rule, 1, 5, 2, 3, 2).items() if x is not None}
    names, options = list(tensors), {"chunk_size": 2} if form == "chunked" else {}

    def call(*leaves):
        given = dict.fromkeys(["q", "k", "v", *rule.gates]) | dict(zip(names, leaves, strict=True))
        return run(getattr(rule, form), given, qk_l2norm=True, **options)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors.values()])


@decaying
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resets_of_minus_80_in_one_token_of_eight_keep_every_later_digit(rule, dtype):
    tensors = inputs(rule, 2, 200, 2, 16, 16)
    tensors["g"][:, ::8] = -80.0
    expected = values_and_gradients(rule.reference, tensors)
    lower = {name: x.to(dtype) for name, x in tensors.items()}
    actual = values_and_gradients(rule.chunked, lower)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= (1e-9 if dtype == torch.float64 else 3e-5), name


@decaying
@pytest.mark.parametrize("T", [1, 40])
def test_infinite_decay_forgets(rule, T):
    tensors = inputs(rule, 1, T, 2, 8, 8)
    tensors["g"][:, 0] = -torch.inf
    if "a" in tensors:
        tensors["a"][:, 0] = 0  # the correction reads the state before it decays
    forgotten, _ = run(rule.op, tensors)
    fresh, _ = run(rule.op, tensors | {"state": None})
    torch.testing.assert_close(forgotten, fresh, rtol=0, atol=1e-12)
    assert values_and_gradients(rule.chunked, tensors)["dg"].isfinite().all()


@every_rule
def test_the_future_does_not_change_the_past(rule):
    tensors = inputs(rule, 1, 70, 2, 8, 8)
    changed = {name: x if x is None or name == "state" else x.clone() for name, x in tensors.items()}
    for name in set(changed) - {"state"}:
        if changed[name] is not None:
            changed[name][:, 41:] = -changed[name][:, 41:].flip(1).abs()
    before, _ = run(rule.op, tensors, chunk_size=32)
    after, _ = run(rule.op, changed, chunk_size=32)
    torch.testing.assert_close(after[:, :41], before[:, :41], rtol=0, atol=1e-12)
    assert not torch.allclose(after[:, 41:], before[:, 41:])


@every_rule
@pytest.mark.parametrize("lengths", [(100, 1, 156), (256, 1), (1, 1, 255)])
def test_a_split_with_carried_state_equals_one_call(rule, lengths):
    tensors = inputs(rule, 2, 257, 2, 8, 8)
    expected, expected_state = run(rule.op, tensors)
    state = tensors.pop("state")
    parts = {name: [None] * 3 if x is None else x.split(lengths, dim=1) for name, x in tensors.items()}
    outputs = []
    for i in range(len(lengths)):
        o, state = run(rule.op, {name: x[i] for name, x in parts.items()} | {"state": state})
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), expected) <= 1e-9
    assert relative_error(state, expected_state) <= 1e-9


@every_rule
def test_packed_documents_equal_each_document_alone(rule):
    ends = torch.tensor([0, 1, 34, 99])
    tensors = inputs(rule, 1, 99, 2, 8, 6)
    state = inputs(rule, 3, 1, 2, 8, 6, seed=1)["state"]
    o, after = run(rule.op, tensors | {"state": state}, cu_seqlens=ends)
    del tensors["state"]
    for i in range(3):
        document = {name: x if x is None else x[:, ends[i] : ends[i + 1]] for name, x in tensors.items()}
        expected, expected_state = run(rule.op, document | {"state": state[i : i + 1]})
        torch.testing.assert_close(o[:, ends[i] : ends[i + 1]], expected)
        torch.testing.assert_close(after[i : i + 1], expected_state)


@every_rule
def test_a_batch_equals_its_rows_alone(rule):
    tensors = inputs(rule, 3, 50, 2, 8, 6, torch.float32)
    together, _ = run(rule.op, tensors)
    rows = [{name: x if x is None else x[i : i + 1] for name, x in tensors.items()} for i in range(3)]
    assert relative_error(together, torch.cat([run(rule.op, row)[0] for row in rows])) <= 1e-6


@every_rule
def test_autocast_leaves_the_recurrence_in_fp32(rule):
    tensors = inputs(rule, 1, 50, 2, 8, 6, torch.float32)
    expected, _ = run(rule.op, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = run(rule.op, tensors)
    assert torch.equal(actual, expected)


@every_rule
def test_strided_inputs_give_what_contiguous_ones_give(rule):
    tensors = inputs(rule, 1, 40, 1, 8, 8)
    expected = values_and_gradients(rule.op, tensors)
    strided = {name: x if x is None else torch.stack([x, x + 1], -1)[..., 0] for name, x in tensors.items()}
    o, final = run(rule.op, strided)
    torch.testing.assert_close(o, expected["o"], rtol=0, atol=1e-12)
    torch.testing.assert_close(final, expected["final"], rtol=0, atol=1e-12)


def test_one_decay_for_all_channels_is_a_decay_per_head():
    tensors = inputs(RULES["linear-attention-decay-per-head"], 2, 70, 2, 8, 6)
    expected, expected_state = run(gated_linear_attention, tensors)
    per_channel = tensors | {"g": tensors["g"][..., None].expand_as(tensors["k"])}
    actual, actual_state = run(gated_linear_attention, per_channel)
    assert relative_error(actual, expected) <= 1e-9
    assert relative_error(actual_state, expected_state) <= 1e-9


def test_a_gated_delta_rule_is_a_dplr_with_the_decayed_key():
    tensors = inputs(RULES["gated-delta"], 2, 70, 2, 8, 6)
    expected, expected_state = run(gated_delta_rule, tensors)
    q, k, v, g, beta, state = tensors.values()
    g = g[..., None].expand_as(k)
    a, b = -g.exp() * k, beta[..., None] * k
    actual, actual_state = dplr_delta_rule(q, k, beta[..., None] * v, g, a, b, state=state)
    assert relative_error(actual, expected) <= 1e-9
    assert relative_error(actual_state, expected_state) <= 1e-9


def test_a_delta_rule_that_writes_nothing_and_no_decay_leave_the_state():
    q, k, v, _, beta, state = inputs(RULES["delta"], 1, 40, 2, 8, 8).values()
    o, after = gated_delta_rule(q, k, v, None, torch.zeros_like(beta), state=state)
    torch.testing.assert_close(after, state, rtol=0, atol=1e-12)
    torch.testing.assert_close(o, 8**-0.5 * torch.einsum("bthk,bhkv->bthv", q, state))


@pytest.mark.parametrize("rule", [RULES["delta"], RULES["dplr-without-decay"]], ids=["delta", "dplr"])
def test_identical_keys_written_at_full_strength_stay_exact(rule):
    tensors = inputs(rule, 1, 128, 1, 16, 16, torch.float32) | {"state": None}
    k = tensors["k"] = F.normalize(tensors["k"][:, :1], dim=-1).expand_as(tensors["k"])
    full = {"beta": torch.ones(1, 128, 1), "a": -k, "b": k}
    o, state = run(rule.op, tensors | {name: full[name] for name in rule.gates if name != "g"}, chunk_size=64)
    # Each write replaces the one before: the state holds the last value alone, o_t = scale (q_t·k) v_t.
    expected = (tensors["q"] * k).sum(-1, keepdim=True) * tensors["v"] * 16**-0.5
    assert relative_error(o, expected) <= 3e-5
    assert relative_error(state[0, 0], k[0, -1, 0, :, None] * tensors["v"][0, -1, 0]) <= 3e-5


def test_gradients_reach_values_alone_when_the_rest_is_frozen():
    tensors = inputs(RULES["gated-delta"], 1, 20, 1, 4, 4)
    tensors["v"].requires_grad_()
    found = [torch.autograd.grad(run(form, tensors)[0].sum(), tensors["v"])[0] for form in DELTA[1:]]
    assert relative_error(*found) <= 1e-9


def test_the_backend_taken_is_told():
    assert resolve_backend("auto") == "chunked"
    assert resolve_backend("reference") == "reference"
    with pytest.raises(ValueError, match="must be one of reference, chunked, triton, auto, got 'cuda'"):
        resolve_backend("cuda")


@every_rule
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 4, 1, 8)}, r"q and k must both be .* got \[1, 4, 2, 8\] and \[1, 4, 1, 8\]; repeat"),
        ({"v": torch.zeros(1, 3, 2, 6)}, r"v must be \[B, T, H, V\] .* got \[1, 3, 2, 6\]; reshape"),
        ({"g": torch.zeros(1, 4)}, r"g must be \[B, T, H.* got \[1, 4\]; "),
        ({"state": torch.zeros(1, 2, 6, 8)}, r"state must be .* = \[1, 2, 8, 6\].* got \[1, 2, 6, 8\]; pass"),
        (
            {"q": torch.zeros(1, 4, 2, 8, dtype=torch.long)},
            r"q must be a tensor of floating-point numbers, got torch.int64",
        ),
        ({"v": [[1.0]]}, r"v must be a tensor of floating-point numbers, got list; convert it"),
        (
            {"q": torch.zeros(1, 4, 2, 8).bfloat16()},
            r"must have one dtype, got torch.bfloat16, torch.float32 and torch.flo",
        ),
        ({"state": [1.0]}, r"state must be a tensor of floating-point numbers, got list; convert it"),
        ({"chunk_size": 0}, r"chunk_size must be at least 1, got 0; leave it out"),
        (
            {"cu_seqlens": torch.tensor([0.0, 4.0])},
            r"cu_seqlens must be a tensor of whole numbers \[N\+1\], got tensor",
        ),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"must rise strictly from 0 to .* 4, got \[0, 3\]; drop"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_refused(rule, change, message):
    with pytest.raises(ValueError, match=message):
        rule.op(**inputs(rule, 1, 4, 2, 8, 6, torch.float32) | change)


@pytest.mark.parametrize(
    ("rule", "change", "message"),
    [
        ("gated-delta", {"beta": None}, r"beta must be a tensor of floating-point numbers, got NoneType"),
        ("dplr", {"a": None}, r"a must be a tensor of floating-point numbers, got NoneType"),
        ("gated-delta", {"g": torch.zeros(1, 4, 2, 8)}, r"g must be \[B, T, H\] = \[1, 4, 2\].*8\]; a decay .* dplr"),
        ("gated-delta", {"beta": torch.zeros(1, 4)}, r"beta must be \[B, T, H\] = \[1, 4, 2\].* got \[1, 4\]"),
        ("dplr", {"g": torch.zeros(1, 4, 2)}, r"g must be \[B, T, H, K\] = \[1, 4, 2, 8\].* got \[1, 4, 2\]; a number"),
        ("dplr", {"b": torch.zeros(1, 4, 2)}, r"b must be \[B, T, H, K\] = \[1, 4, 2, 8\], .* got \[1, 4, 2\]"),
    ],
)
def test_gates_have_the_shape_of_their_rule(rule, change, message):
    with pytest.raises(ValueError, match=message):
        RULES[rule].op(**inputs(RULES[rule], 1, 4, 2, 8, 6, torch.float32) | change)


@every_rule
def test_packed_documents_need_a_single_row(rule):
    with pytest.raises(ValueError, match="batch size 1, got 2; concatenate"):
        run(rule.op, inputs(rule, 2, 4, 2, 8, 6), cu_seqlens=torch.tensor([0, 4]))


def test_documents_that_change_in_place_are_looked_at_again():
    ends, calls = torch.tensor([0, 3, 5]), []

    def make():
        calls.append(ends.tolist())
        return calls[-1]

    assert once(ends, ("x",), make) is once(ends, ("x",), make)
    ends[1] = 2
    assert once(ends, ("x",), make) == [0, 2, 5]
    assert calls == [[0, 3, 5], [0, 2, 5]]
    check_documents(ends, 1, 5)
    ends[2] = 4
    with pytest.raises(ValueError, match="must rise strictly from 0 to the number of tokens, 5"):
        check_documents(ends, 1, 5)
