"""Importance: planted useless parts are found, and the greedy order is the brute-force one."""

import pytest
import torch
from torch.testing import assert_close

from jetlab.compress.calibration import Calibration, calibration, random_rows, rows_of
from jetlab.compress.importance import logit_error, measure, only, remove_layers, single_removals
from jetlab.compress.prune import apply
from jetlab.compress.target import Target
from jetlab.data.packing import Mixture


def layers_gone(model, *gone):
    """The model without some layers, built anew."""
    left = tuple(layer for layer in range(len(model.model.layers)) if layer not in gone)
    return apply(model, Target(left, 24, 20, 6), None)


def brute_error(model, rows, *gone):
    """Mean squared error of the logits, row by row without padding."""
    errors = []
    with torch.no_grad():
        for ids, real in zip(rows.ids, rows.real, strict=True):
            ids = ids[real][None]
            logits = [net(ids, use_cache=False).logits for net in (layers_gone(model, *gone), model)]
            errors.append((logits[0] - logits[1]).square().mean(-1).flatten())
    return float(torch.cat(errors).mean())


def test_the_one_layer_map_is_the_error_of_models_built_without_the_layer(small, rows):
    model = small()
    found = single_removals(model, rows, rows_at_once=3)
    assert [removal.layer for removal in found] == [0, 1, 2, 3, 4]
    for removal in found:
        assert removal.error == pytest.approx(brute_error(model, rows, removal.layer), rel=1e-4)  # fp32, padded or not


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_greedy_order_is_the_one_of_brute_force(small, rows, seed):
    model, gone = small("*-*M-", seed=seed), []
    for removal in remove_layers(model, rows, 4):
        attention = {0, 2} - set(gone)
        left = set(range(5)) - set(gone) - (attention if len(attention) == 1 else set())  # the last stays
        errors = {layer: brute_error(model, rows, *gone, layer) for layer in left}
        assert removal.layer == min(errors, key=errors.get)
        assert removal.error == pytest.approx(errors[removal.layer], rel=1e-4)
        gone.append(removal.layer)


def test_a_layer_that_adds_nothing_goes_first(small, rows):
    model = small("M-*M-")
    with torch.no_grad():
        model.model.layers[3].mixer.out_proj.weight.zero_()
    first, second = remove_layers(model, rows, 2)
    assert (first.layer, first.error) == (3, 0.0) and second.error > 0


def test_only_the_kinds_asked_for_go(small, rows):
    model = small("M*-*M-*")
    gone = remove_layers(model, rows, 2, kinds=("attention",))
    assert len({removal.layer for removal in gone} & {1, 3, 6}) == 2
    with pytest.raises(ValueError, match="0 to 2 of kinds attention can be removed, got 3; one layer stays"):
        remove_layers(model, rows, 3, kinds=("attention",))


def test_the_first_round_may_be_given(small, rows):
    model = small()
    single = single_removals(model, rows)
    assert remove_layers(model, rows, 2, first=single) == remove_layers(model, rows, 2)


def test_measuring_leaves_the_model_as_it_was(small, rows):
    model = small().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    remove_layers(model, rows, 1)
    measure(model, rows, layers=[0, 1])
    assert model.training and len(model.model.layers) == 5
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_come_back_when_a_forward_fails(small):
    model = small()
    with pytest.raises(RuntimeError, match="stop"), only(model, [0]):
        raise RuntimeError("stop")
    assert len(model.model.layers) == 5


@pytest.mark.parametrize("n", [5, -1])
def test_no_more_layers_go_than_there_are(small, rows, n):
    with pytest.raises(ValueError, match=f"0 to 4 of kinds mamba2, mlp, attention can be removed, got {n}"):
        remove_layers(small(), rows, n)


def test_an_unknown_kind_and_another_aggregate_are_refused(small, rows):
    with pytest.raises(ValueError, match="kinds mamba2, mlp, attention, got moe"):
        remove_layers(small(), rows, 1, kinds=("mlp", "moe"))
    with pytest.raises(ValueError, match="mean or l2, got 'max'"):
        measure(small(), rows, how="max")


def test_silent_neurons_channels_and_heads_score_zero(small, rows):
    model = small()
    with torch.no_grad():
        model.model.layers[1].mixer.up_proj.weight[[3, 17]] = 0
        for norm in [*(block.norm for block in model.model.layers), model.model.norm_f]:
            norm.weight[5] = 0
        in_proj = model.model.layers[3].mixer.in_proj.weight
        in_proj[24 + 2 * 4 : 24 + 3 * 4] = 0  # x of head 2, behind z of 6 heads of 4
    found = measure(model, rows)
    assert torch.nonzero(found.neurons[1] == 0).flatten().tolist() == [3, 17]
    assert torch.nonzero(found.channels == 0).flatten().tolist() == [5]
    assert torch.nonzero(found.heads[3] == 0).flatten().tolist() == [2]
    assert bool((found.heads[0] > 0).all()) and set(found.neurons) == {1, 4}


@pytest.mark.parametrize("how", ["mean", "l2"])
def test_scores_are_those_of_the_formula(small, rows, how):
    model = small("-M", seed=3)
    found = measure(model, rows, how=how, rows_at_once=3)
    neurons, channels, x2 = [], [], []
    with torch.no_grad():
        for ids, real in zip(rows.ids, rows.real, strict=True):
            hidden = model.model.embeddings(ids[real])[None]
            first, second = model.model.layers
            a = torch.relu(first.norm(hidden) @ first.mixer.up_proj.weight.T).square()
            middle = hidden + a @ first.mixer.down_proj.weight.T
            last = middle + second.mixer(second.norm(middle))
            normed = [first.norm(hidden), second.norm(middle), model.model.norm_f(last)]
            neurons.append(a.abs().mean(1)[0])
            channels.append([n.abs().mean(1)[0] for n in normed])
            x2.append((second.norm(middle) @ second.mixer.in_proj.weight[24:48].T)[0].square())

    def over_rows(values):
        values = torch.stack(values)
        return values.mean(0) if how == "mean" else values.square().mean(0).sqrt()

    assert_close(found.neurons[0], over_rows(neurons), rtol=1e-4, atol=1e-6)  # fp32
    expected = sum(over_rows([row[place] for row in channels]) for place in range(3))
    assert_close(found.channels, expected, rtol=1e-4, atol=1e-6)
    assert_close(found.heads[1], torch.cat(x2).mean(0).view(6, 4).sum(1).sqrt(), rtol=1e-4, atol=1e-6)


def test_a_row_of_large_activations_counts_more_by_l2(small):
    model = small("-")
    rows = rows_of([[1, 2, 3], [4, 5, 6]])
    mean, l2 = (measure(model, rows, how=how).neurons[0] for how in ("mean", "l2"))
    assert bool((l2 >= mean).all()) and bool((l2 > mean).any())


def test_padding_does_not_count(small, rows):
    model = small()
    other = Calibration(torch.where(rows.real, rows.ids, 36), rows.real)
    assert_close(measure(model, other).channels, measure(model, rows).channels, rtol=1e-5, atol=0)
    errors = [[removal.error for removal in single_removals(model, data)] for data in (rows, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_importance_of_some_layers_is_that_of_the_model_without_the_others(small, rows):
    model = small()
    some, alone = measure(model, rows, layers=[0, 4]), measure(layers_gone(model, 1, 2, 3), rows)
    assert set(some.heads) == {0} and set(some.neurons) == {4}
    assert torch.equal(some.channels, alone.channels) and torch.equal(some.neurons[4], alone.neurons[1])


def test_the_error_of_a_model_against_itself_is_zero(small, rows):
    model = small()
    assert logit_error(model, model, rows) == 0
    assert logit_error(model, layers_gone(model, 2), rows, rows_at_once=1) == pytest.approx(
        brute_error(model, rows, 2), rel=1e-4
    )


def test_calibration_rows_are_not_those_of_training(tasks, tokenizer):
    mixture = Mixture(tasks, {"math": 2, "code": 1}, tokenizer, 64, seed=5)
    data = calibration(mixture, 2)
    assert data.ids.shape == (6, 64) and bool((data.ids[~data.real] == tokenizer.pad_token_id).all())
    trained = torch.cat([mixture.batch(step).ids for step in range(2)])
    assert not (data.ids[:, None] == trained[None]).all(-1).any()
    assert torch.equal(data.ids, calibration(mixture, 2).ids)


def test_random_rows_depend_on_their_seed():
    a, b, c = (random_rows(37, 3, 50, seed).ids for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and int(a.max()) < 37


@pytest.mark.parametrize("rows", [[], [[1, 2], []]])
def test_rows_without_tokens_are_refused(rows):
    with pytest.raises(ValueError, match="rows with at least one token"):
        rows_of(rows)
