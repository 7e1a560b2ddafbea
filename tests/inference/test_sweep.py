"""The sweep: what it builds and how it counts; what needs a GPU runs where there is one."""

from dataclasses import replace

import pytest
import torch
from transformers import NemotronHForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jetlab.inference import roofline, sweep
from jetlab.models import nemotron, zoo


def tiny():
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=1200, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    return sweep.draw_weights(Qwen2ForCausalLM(config)).eval()


@pytest.fixture
def run(monkeypatch):
    """What a decoding point runs, put in place of the engine on a machine without a card: run(function)."""
    monkeypatch.setattr(sweep, "clean", lambda: None)
    monkeypatch.setattr(sweep, "capped", lambda cap_gb: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7e9)
    return lambda function: monkeypatch.setitem(sweep.RUNS, ("engine", "decode"), function)


def raising(error):
    def fails(*_):
        raise error

    return fails


def test_shapes_derived_from_the_published_one_are_what_their_name_says():
    full = sweep.shape_of("Jet-Nemotron-2B 4 full")
    assert full.count("attention") == 4 and full.count("sliding_attention") == 0
    wide = sweep.shape_of("Jet-Nemotron-2B 256/288/4")
    assert (wide.linear.n_heads, wide.linear.head_dim, wide.linear.head_dim_v) == (4, 256, 288)
    assert roofline.state_bytes(wide) == roofline.state_bytes(zoo.shape("Jet-Nemotron-2B"))
    for shape in (full, wide):
        model = zoo.build("Jet-Nemotron-2B", derived=shape)
        assert sum(p.numel() for p in model.parameters()) == zoo.n_params(shape)


def test_drawn_weights_depend_on_the_seed_alone_and_leave_norms_at_one():
    first, again = tiny(), tiny()
    for (name, x), y in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)
        if "norm" in name:
            assert bool((x == 1).all())
    assert 0.015 < first.model.layers[0].mlp.up_proj.weight.std() < 0.025


def test_the_engines_error_is_held_against_the_models_own():
    found = sweep.errors(tiny(), n_tokens=130, chunk=32)
    assert found["own_error"] == 0.0  # its format is fp32 already
    assert found["error"] == found["exact_error"] < 1e-4
    rounded = sweep.errors(tiny().bfloat16(), n_tokens=130, chunk=32)
    assert rounded["exact_error"] < 1e-4
    assert 1e-3 < rounded["own_error"] < 0.1 and 1e-3 < rounded["error"] < 2 * rounded["own_error"]


def test_a_wrong_engine_shows(monkeypatch):
    step = sweep.Engine.step
    monkeypatch.setattr(sweep.Engine, "step", lambda self, tokens: step(self, tokens.roll(1)))
    assert sweep.errors(tiny(), n_tokens=130, chunk=32)["exact_error"] > 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a sweep measures a GPU and its memory")
def test_what_does_not_fit_is_a_line_and_the_next_point_runs():
    model = tiny().to("cuda", torch.bfloat16)
    points = [sweep.Point("Qwen2.5-1.5B", "decode", 256, batch=batch, chunk=64, repeats=2) for batch in (10**7, 2)]
    rows = [sweep.measure(model, point, 4e12, 8e14) for point in points]
    assert [row["status"] for row in rows] == ["out of memory", "ok"]
    assert "tokens_per_s" not in rows[0] and rows[1]["tokens_per_s"] > 0


def test_out_of_memory_is_a_line_and_not_the_end(run):
    run(raising(MemoryError("no room")))
    row = sweep.measure(None, sweep.Point("Qwen2.5-1.5B", "decode", 256, batch=4), 4e12, 8e14)
    assert (row["status"], row["batch"]) == ("out of memory", 4)
    assert set(row) <= set(sweep.COLUMNS)


def test_a_batch_that_was_looked_for_gives_way_when_it_no_longer_fits(run, monkeypatch):
    asked = []

    def fits_below_197(model, point, batch):
        asked.append(batch)
        if batch >= 197:
            raise MemoryError("no room")
        return {"ms": 1.0, "tokens_per_s": 1.0}

    run(fits_below_197)
    monkeypatch.setattr(sweep, "largest", lambda model, point: 200)
    row = sweep.measure(None, sweep.Point("Qwen2.5-1.5B", "decode", 256), 4e12, 8e14)
    assert asked == [200, 198, 196]
    assert (row["batch"], row["status"], row["peak_gb"]) == (196, "ok", 7.0)
    floor_s = roofline.decode_bytes(zoo.shape("Qwen2.5-1.5B"), 264, 196) / 4e12
    assert row["fraction_of_floor"] == pytest.approx(floor_s / 1e-3)


def test_other_failures_are_not_taken_for_a_lack_of_memory(run):
    run(raising(RuntimeError("an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal"):
        sweep.measure(None, sweep.Point("Qwen2.5-1.5B", "decode", 256, batch=4), 4e12, 8e14)
    assert sweep.out_of_memory(RuntimeError("Triton Error [CUDA]: out of memory"))


def test_a_batch_can_be_the_largest_that_fits_at_a_longer_context(monkeypatch):
    asked = []

    def fits(model, point):
        def works(batch):
            asked.append(point.context)
            return batch * point.context <= 4000

        return works

    monkeypatch.setattr(sweep, "fits", fits)
    monkeypatch.setattr(sweep.memory, "available_bytes", lambda device: 10**6)
    monkeypatch.setattr(sweep.memory, "engine_bytes", lambda model, batch, length, n, state: 10**5 * batch)
    point = sweep.Point("Qwen2.5-1.5B", "decode", 100, up_to=1000)
    assert sweep.largest(tiny(), point) == 4
    assert set(asked) == {1000}
    assert sweep.largest(tiny(), replace(point, up_to=None)) == 40


@pytest.mark.parametrize("pattern", ["M-*", "*-M"])
def test_transformers_cache_of_a_hybrid_is_filled_as_if_a_text_had_been_read(pattern):
    shape = replace(zoo.shape("NVIDIA-Nemotron-Nano-9B-v2"), d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48)
    shape = replace(shape, vocab_size=97, layer_kinds=zoo.layer_kinds(pattern), n_layers=3)
    shape = replace(shape, linear=zoo.LinearDims(4, 8, 4, n_groups=2))
    model = sweep.draw_weights(NemotronHForCausalLM(nemotron.config_of(shape, chunk_size=4))).eval()
    with torch.inference_mode():
        cache = sweep.filled_cache(model, 3, 19)
        assert cache.get_seq_length() == 19
        prompt = torch.ones(3, 20, dtype=torch.long)
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert model.generate(prompt, past_key_values=cache, **options).shape == (3, 24)
    assert cache.get_seq_length() == 23
