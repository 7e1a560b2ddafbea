"""Specification of the paper's benchmarks: what is asked is what was released, and lm-eval scores it from local files."""

import csv
import json
import math
import socket
from pathlib import Path

import pytest
import torch

from jetlab.config import ConfigError, EvaluateStudy, Tasks
from jetlab.evaluate import benchmarks
from jetlab.evaluate.benchmarks import Benchmark, BenchmarkScore, beside_paper, read_benchmarks, resolve
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT

TABLE = read_benchmarks()


@pytest.fixture
def no_network(monkeypatch):
    """Sockets raise, and the libraries do not know that there is no network; afterwards nobody may have tried one."""
    import datasets

    tried = []

    def refuse(*_args, **_options):
        raise OSError("a test must not use the network")

    def look_up(host, *_args, **_options):  # before every connection to a named host
        tried.append(host)
        refuse()

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for name in ("socket", "create_connection"):  # urllib3 opens one when it is imported, to learn of IPv6
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    assert not tried


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_axis_of_the_paper_has_its_benchmarks():
    with (ROOT / "paper/axes.csv").open() as file:
        axes = [row["axis"] for row in csv.DictReader(file)]
    assert list(dict.fromkeys(benchmark.axis for benchmark in TABLE.values())) == sorted(
        axes, key=["knowledge", "commonsense", "math", "retrieval", "coding", "long context"].index
    )


def test_every_printed_column_exists_and_no_benchmark_takes_another_ones():
    columns = [(benchmark.table, benchmark.column) for benchmark in TABLE.values() if benchmark.table]
    assert len(set(columns)) == len(columns) == len(TABLE) - 1  # RULER is not in the paper
    for benchmark in TABLE.values():
        if benchmark.table:
            assert benchmark.printed("Qwen2.5-1.5B") is not None, benchmark.name
    assert TABLE["gsm8k"].printed("Jet-Nemotron-2B") == 76.2
    assert TABLE["piqa"].printed("Jet-Nemotron-2B") is None  # an empty cell
    assert TABLE["ruler_64k"].printed("Qwen2.5-1.5B") is None


def test_shots_are_those_that_the_paper_prints():
    """Sec 3.1: GSM8K and MATH 4, GPQA and MMLU-Pro 5, zero otherwise; the released BBH brings three examples."""
    shown = {name: benchmark.n_shots for name, benchmark in TABLE.items() if benchmark.n_shots}
    assert shown == {"gsm8k": 4, "math": 4, "gpqa": 5, "mmlu_pro": 5, "bbh": 3}
    assert "zero-shot" in TABLE["bbh"].note


def test_metrics_are_those_that_were_released():
    normalised = {"arc_c", "arc_e", "piqa", "obqa", "mathqa"}
    plain = {"winogrande", "boolq", "truthfulqa", "mmlu", "mmlu_stem"}
    for names, metric in ((normalised, "acc_norm"), (plain, "acc"), ({"fda", "swde", "squad"}, "contains")):
        assert {name for name, benchmark in TABLE.items() if benchmark.metric == metric} == names
    assert (TABLE["gsm8k"].metric, TABLE["gsm8k"].filter) == ("exact_match", "flexible-extract")


def test_prompts_hold_4096_tokens_and_those_of_long_context_64k():
    lengths = {name: benchmark.max_length for name, benchmark in TABLE.items()}
    long = {name for name, benchmark in TABLE.items() if benchmark.axis == "long context"}
    assert {lengths[name] for name in long} == {65536}
    assert {lengths[name] for name in set(lengths) - long} == {4096}


# ---- lm-eval's files ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_benchmark_resolves_in_the_installed_lm_eval_without_a_network(no_network):
    """`resolve` also checks that every leaf reports the metric and the filter."""
    resolved = {found.benchmark.name: found.leaves for found in resolve(list(TABLE))}
    assert list(resolved) == list(TABLE)
    n_leaves = {name: len(leaves) for name, leaves in resolved.items()}
    expected = {"mmlu": 57, "mmlu_stem": 19, "mmlu_pro": 14, "bbh": 27, "math": 7, "evalplus": 4, "ruler_64k": 13}
    assert {name: n_leaves[name] for name in expected} == expected
    for name, leaves in resolved.items():
        assert name == "ruler_64k" or all(leaf.dataset for leaf in leaves)
    assert {leaf.output_type for leaf in resolved["fda"]} == {"generate_until"}
    assert {leaf.output_type for leaf in resolved["arc_c"]} == {"multiple_choice"}


@pytest.mark.slow
def test_every_task_that_runs_code_is_marked_so(no_network):
    """lm-eval marks them itself: pass@1 stands for its own judge of them."""
    for found in resolve(list(TABLE)):
        assert found.benchmark.executes_code == any("pass@1" in leaf.metrics for leaf in found.leaves)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "accuracy"}, r"arc_easy reports no metric 'accuracy'; it has acc, acc_norm"),
        ({"filter": "strict-match"}, r"arc_easy reports no filter 'strict-match'; it has none"),
        ({"task": "arc_easier"}, r"no task 'arc_easier'.*include_path"),
    ],
)
def test_what_lm_eval_does_not_have_is_refused(changes, message):
    row = {"name": "arc_e", "axis": "commonsense", "task": "arc_easy", "metric": "acc"} | changes
    with pytest.raises(ValueError, match=message):
        resolve([Benchmark(**row)])


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"got arc.*it has mmlu, mmlu_pro, bbh, arc_c"):
        resolve(["arc"])


def evaluate_section(sizes, **changes):
    tasks = {"seq_len": 64, "sizes": sizes, "n_contexts": {"search": 1, "select": 1, "test": 1}, "n_questions": 1}
    common = {"profile": "test", "seed": 0, "n_threads": 1, "path": "paper", "device": "cpu"}
    section = {"n_lm_eval": 1, "n_samples": 1, "lengths": [0], "n_length_contexts": 1}
    section |= {"benchmarks": [], "n_benchmark": None, "execute_code": False}
    return {"common": common, "tasks": tasks} | section | changes


def test_the_study_takes_known_benchmarks_and_asks_before_code_is_run(sizes):
    study = EvaluateStudy.from_params(**evaluate_section(sizes, benchmarks=["mmlu", "gsm8k"], n_benchmark=100))
    assert study.benchmarks == ["mmlu", "gsm8k"]
    with pytest.raises(ConfigError, match=r"got gsm; it has mmlu"):
        EvaluateStudy.from_params(**evaluate_section(sizes, benchmarks=["gsm"]))
    with pytest.raises(ConfigError, match=r"evalplus runs code.*execute_code: true"):
        EvaluateStudy.from_params(**evaluate_section(sizes, benchmarks=["evalplus"]))
    EvaluateStudy.from_params(**evaluate_section(sizes, benchmarks=["evalplus"], execute_code=True))


# ---- our own task files ---------------------------------------------------------------------------------------------


def programs():
    import importlib.util

    spec = importlib.util.spec_from_file_location("programs", benchmarks._OWN_TASKS / "programs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param("think\n[/THOUGHT]\n[ANSWER]\nassert f(16, 'a)') == 17\n", "16, 'a)'", id="arguments"),
        pytest.param("[ANSWER]assert f([1], key=2) == 17[/ANSWER] more", "[1], key=2", id="keywords"),
        pytest.param("[ANSWER]\n16\n", "16", id="bare"),
        pytest.param("", "None", id="nothing"),
    ],
)
def test_a_predicted_input_is_read_off_the_assertion(answer, expected):
    assert programs().predicted_input(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param('[THOUGHT]x == y[/THOUGHT]\n[ANSWER]\nassert f("hi") == "bhihia"\n', "'bhihia'", id="string"),
        pytest.param("[ANSWER]assert f('==') == ['==', 1]", "['==', 1]", id="equals-inside"),
        pytest.param("[ANSWER]\n'x'\n", "'x'", id="bare"),
    ],
)
def test_a_predicted_output_is_read_off_the_assertion(answer, expected):
    assert programs().predicted_output(answer) == expected


def test_programs_of_cruxeval_assert_what_was_predicted():
    from jetlab.evaluate.execution import run_program

    doc = {"code": "def f(s):\n    return 'b' + s", "input": "'hi'", "output": "'bhi'"}
    good, bad = programs().outputs([["[ANSWER]assert f('hi') == 'bhi'", "[ANSWER]assert f('hi') == 'hi'"]], [doc])[0]
    assert run_program(good).result == "pass" and run_program(bad).result == "fail"
    good, bad = programs().inputs([["[ANSWER]assert f('hi') == 'bhi'", "[ANSWER]assert f(1) == 'bhi'"]], [doc])[0]
    assert run_program(good).result == "pass" and run_program(bad).result == "fail"


def own_task(name):
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(benchmarks._OWN_TASKS / f"{name}.yaml")


HUMANEVAL = {
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0",
    "entry_point": "double",
}
MBPP = {
    "prompt": "Double a number.",
    "test_imports": ["import math"],
    "test_list": ["assert double(2) == 4", "assert double(math.inf) == math.inf"],
    "test": "for x in (2, 7):\n    assert double(x) == 2 * x",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "doc", "good", "bad"),
    [
        pytest.param("humaneval", HUMANEVAL, "    return 2 * x", "    return 4", id="humaneval"),
        pytest.param("humaneval_plus", HUMANEVAL, "    return x + x", "    return x", id="humaneval-plus"),
        pytest.param("mbpp", MBPP, "def double(x):\n    return 2 * x", "def double(x):\n    return 4", id="mbpp"),
        pytest.param("mbpp_plus", MBPP, "double = lambda x: 2 * x", "double = lambda x: 4", id="mbpp-plus"),
    ],
)
def test_a_program_is_judged_by_the_tests_of_its_document(name, doc, good, bad):
    from lm_eval.utils import apply_template

    from jetlab.evaluate.execution import judge

    task = own_task(name)
    assert apply_template(task["doc_to_text"], doc).endswith(doc["prompt"] if name.startswith("h") else "```python\n")
    process_results = judge(lambda doc: apply_template(task["doc_to_target"], doc), [1])
    programs = task["filter_list"][0]["filter"][0]["filter_fn"]([[good], [bad]], [doc, doc])
    assert [process_results(doc, [program])["pass@1"] for program in programs] == [1.0, 0.0]


@pytest.mark.slow
def test_the_released_code_benchmarks_run_from_end_to_end_on_stand_in_documents(
    tmp_path, tokenizer, monkeypatch, no_network
):
    """Their task files as they are, one document for each, and a model that answers half of what it is asked rightly."""
    import shutil

    import lm_eval.tasks

    from jetlab.evaluate.harness import HarnessModel

    shutil.copytree(benchmarks._OWN_TASKS, tmp_path / "ours")
    shutil.copytree(Path(lm_eval.tasks.__file__).parent / "cruxeval", tmp_path / "cruxeval")
    crux = {"code": "def f(s):\n    return 'b' + s", "input": "'hi'", "output": "'bhi'"}
    documents = {"jetlab_humaneval": HUMANEVAL, "jetlab_mbpp_plus": MBPP}
    documents |= {"jetlab_cruxeval_input": crux, "jetlab_cruxeval_output": crux}
    answers = iter(["    return 2 * x", "def double(x):\n    return 4"])

    def answer(_self, requests, disable_tqdm=True):
        if len(requests) == 1:
            return [next(answers)]
        assert len(requests) == 10  # samples of one document
        right = requests[0].args[0].rstrip().endswith("[THOUGHT]")
        good = "so it is [/THOUGHT]\n[ANSWER]\nassert f('hi') == 'bhi'\n"
        return [good if right and i < 2 else "[ANSWER]assert f(0) == 0" for i in range(10)]

    monkeypatch.setattr(HarnessModel, "generate_until", answer)
    rows = []
    for task, doc in documents.items():
        file = tmp_path / f"{task}.jsonl"
        file.write_text(json.dumps(doc) + "\n")
        local = {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")}
        member = {"task" if "cruxeval" not in task else "group": task, "dataset_path": "json", "dataset_kwargs": local}
        (tmp_path / f"{task}.yaml").write_text(json.dumps({"group": f"stand_in_{task}", "task": [member]}))
        metric = "pass@5" if "cruxeval" in task else "pass@1"
        rows.append(row(f"stand_in_{task}", metric, filter="program", executes_code=True))
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    found = benchmarks.score(model, tokenizer, rows, include_path=tmp_path, execute_code=True)
    # 2 of 10 samples pass, 5 are drawn: 1 - C(8, 5) / C(10, 5) = 1 - 56 / 252
    assert [r.value for r in found] == [1.0, 0.0, pytest.approx(1 - 56 / 252), pytest.approx(1 - 56 / 252)]
    assert [r.n for r in found] == [1, 1, 1, 1]


def test_our_tasks_that_run_code_do_not_run_it_by_themselves():
    with pytest.raises(RuntimeError, match="execute_code=True"):
        programs().not_run({}, [])


# ---- beside the paper -----------------------------------------------------------------------------------------------


def test_our_scores_stand_beside_the_printed_ones_in_percent():
    row = BenchmarkScore("gsm8k", "gsm8k", "exact_match", 0.5, 0.05, 100, 4, "3.0")
    assert beside_paper({"hybrid": [row]}) == [
        {
            "benchmark": "gsm8k",
            "axis": "math",
            "task": "gsm8k",
            "metric": "exact_match",
            "shots": 4,
            "Qwen2.5-1.5B (printed)": 62.4,
            "Jet-Nemotron-2B (printed)": 76.2,
            "hybrid": 50.0,
            "hybrid se": 5.0,
        }
    ]
    assert [found["benchmark"] for found in beside_paper({})] == list(TABLE)


# ---- scoring from local files ---------------------------------------------------------------------------------------

N_CONTEXTS, N_QUESTIONS = 6, 3
NOISE = 0.05  # at which the teacher answers some questions only
HYBRID = ["gated_deltanet", "jetblock", "attention", "gated_deltanet"] * 2


@pytest.fixture(scope="module", params=["plain", "slots", "hybrid"])
def model(request):
    """The bundled teacher without slots and with them, disturbed so that it errs, and a hybrid of it, untrained."""
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(NOISE * torch.randn(p.shape, generator=generator))
    if request.param == "plain":
        return model
    torch.manual_seed(0)
    return (
        surgery.attach(model) if request.param == "slots" else surgery.convert(model, HYBRID, BlockDims(64, 2, 16, 16))
    )


@pytest.fixture
def folder(tmp_path, sizes):
    """One task of each kind: the study's `knowledge` (choices) and `retrieval` (log likelihood), and two written here."""
    from jetlab.evaluate.harness import write_tasks

    contexts = {"search": 1, "select": 1, "test": 1}
    study = Tasks(seq_len=64, sizes=sizes, n_contexts=contexts, n_questions=N_QUESTIONS)
    write_tasks(tmp_path, study, ("knowledge", "retrieval"), N_CONTEXTS, 0)
    documents = (tmp_path / "retrieval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "shots.jsonl").write_text("".join(documents[:2]))
    (tmp_path / "asked.jsonl").write_text("".join(documents[2:]))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"train": str(tmp_path / "shots.jsonl"), "test": str(tmp_path / "asked.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "text",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "fewshot_delimiter": " ",
    }
    metric = {"aggregation": "mean", "higher_is_better": True}
    likelihood = {
        "task": "shown_likelihood",
        "output_type": "loglikelihood",
        "metric_list": [{"metric": "acc"} | metric],
    }
    written = {
        "task": "shown_written",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [" "]} | metric],  # the space before the answer
    }
    for task in (likelihood, written):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(shared | task))
    programs = [("value = 1", "assert value == 1"), ("value = 2", "assert value == 1"), ("value = 1", "assert value")]
    lines = [json.dumps({"text": "a", "start": start, "tests": tests}) + "\n" for start, tests in programs]
    (tmp_path / "code.jsonl").write_text("".join(lines))
    (tmp_path / "starts.py").write_text(
        "def programs(resps, docs):\n    return [[doc['start'] + ' # ' + r.replace('\\n', ' ') for r in rs]"
        " for rs, doc in zip(resps, docs)]\n"
    )
    code = {
        "task": "code",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "code.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
        "output_type": "generate_until",
        "unsafe_code": True,
        "doc_to_text": "text",
        "doc_to_target": "{{tests}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
        "metric_list": [{"metric": "exact_match"} | metric],
    }
    custom = "filter_list: [{name: program, filter: [{function: custom, filter_fn: !function starts.programs}]}]\n"
    head = "".join(f"{key}: {json.dumps(value)}\n" for key, value in code.items())
    (tmp_path / "code.yaml").write_text(head + custom)
    (tmp_path / "both.yaml").write_text(
        json.dumps(
            {
                "group": "both",
                "task": ["knowledge", "retrieval"],
                "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
            }
        )
    )
    return tmp_path


def row(task, metric, **changes):
    return Benchmark(**({"name": task, "axis": "knowledge", "task": task, "metric": metric} | changes))


CHOICES, LIKELIHOOD = row("knowledge", "acc"), row("retrieval", "acc")
SHOWN = [row("shown_likelihood", "acc", n_shots=2), row("shown_written", "exact_match", n_shots=2)]
CODE = row("code", "pass@1", filter="program", executes_code=True)


@pytest.mark.slow
def test_tasks_of_every_kind_are_scored_from_local_files(model, folder, tokenizer, tasks, no_network, capfd):
    from jetlab.evaluate.suite import Exam

    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    rows = benchmarks.score(
        model, tokenizer, [CHOICES, LIKELIHOOD, *SHOWN, CODE], include_path=folder, execute_code=True, batch_size=4
    )
    assert capfd.readouterr() == ("", "")
    torch.testing.assert_close(torch.rand(1), expected_draw)
    found = {row.name: row for row in rows}
    assert list(found) == ["knowledge", "retrieval", "shown_likelihood", "shown_written", "code"]
    if any(isinstance(module, surgery.Slot) for module in model.modules()):
        exam = Exam([tasks["knowledge"], tasks["retrieval"]], tokenizer, "test", N_CONTEXTS, 0, n_questions=N_QUESTIONS)
        for name, ours in exam.score(model).items():
            assert found[name].value == pytest.approx(ours.value, abs=1e-12)
            assert 0 < ours.value < 1 or surgery.kinds_of(model)[0] != "attention"
    assert found["knowledge"].n == N_CONTEXTS * N_QUESTIONS and found["shown_written"].n == N_CONTEXTS * N_QUESTIONS - 2
    # the answer is one token: it is written exactly if it is the likeliest one
    assert found["shown_written"].value == found["shown_likelihood"].value
    assert found["shown_written"].n_shots == 2
    # two of three programs pass; deviations 1/3, -2/3, 1/3: their squares sum to 2/3; √(2/3 / 2) / √3
    assert found["code"].value == pytest.approx(2 / 3)
    assert found["code"].se == pytest.approx(1 / 3)


@pytest.mark.slow
def test_shown_examples_stand_in_the_prompt(model, folder, tokenizer):
    """Without them the prompts differ, and so do the log likelihoods that the scores come from."""
    from jetlab.evaluate.harness import HarnessModel

    asked = []
    original = HarnessModel.generate_until

    def watched(self, requests, disable_tqdm=True):
        asked.append(requests[0].args[0])
        return original(self, requests, disable_tqdm)

    HarnessModel.generate_until = watched
    try:
        for n_shots in (0, 2):
            benchmarks.score(
                model, tokenizer, [row("shown_written", "exact_match", n_shots=n_shots)], include_path=folder, limit=1
            )
    finally:
        HarnessModel.generate_until = original
    shots = [json.loads(line) for line in (folder / "shots.jsonl").read_text().splitlines()]
    examples = "".join(f"{shot['text']}{shot['answer']} " for shot in shots)
    assert asked[1].replace(" ", "") == (examples + asked[0]).replace(" ", "")  # lm-eval joins them at a single space


@pytest.mark.slow
def test_a_group_has_the_mean_of_its_tasks_and_its_error(folder, tokenizer):
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    a, b, both = benchmarks.score(model, tokenizer, [CHOICES, LIKELIHOOD, row("both", "acc")], include_path=folder)
    assert both.value == pytest.approx((a.value + b.value) / 2)
    assert both.se == pytest.approx(math.hypot(a.se, b.se) / 2)
    assert both.n == a.n + b.n


@pytest.mark.slow
def test_code_is_run_only_when_asked_for(folder, tokenizer):
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    with pytest.raises(ValueError, match=r"code would run programs.*execute_code=True"):
        benchmarks.score(model, tokenizer, [CHOICES, CODE], include_path=folder)
    unmarked = row("code", "pass@1", filter="program")  # lm-eval's own mark still stands
    with pytest.raises(ValueError, match="marked as unsafe"):
        benchmarks.score(model, tokenizer, [unmarked], include_path=folder, execute_code=True)


@pytest.mark.slow
def test_a_limit_and_a_length_bound_what_is_read(folder, tokenizer):
    model, _ = surgery.load(ROOT / "assets/teacher/0")
    assert benchmarks.score(model, tokenizer, [CHOICES], include_path=folder, limit=4)[0].n == 4
    with pytest.raises(AssertionError, match="maximum sequence length"):
        benchmarks.score(model, tokenizer, [SHOWN[1]], include_path=folder, max_length=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hybrid", "jet_nemotron"])
def test_generation_in_batches_equals_greedy_decoding_alone(kind, tokenizer):
    """Prompts of two lengths, so that the shorter one is padded on the left."""
    from lm_eval.api.instance import Instance

    from jetlab.evaluate.harness import HarnessModel, quietly

    if kind == "hybrid":
        model, _ = surgery.load(ROOT / "assets/teacher/0")
        torch.manual_seed(0)
        model = surgery.convert(model, HYBRID, BlockDims(64, 2, 16, 16))
    else:
        model = tiny_jet_nemotron(len(tokenizer))
    prompts = ["the the the", "of and to in a of and to in a"]
    options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, options), 0, ("t", i, 1)) for i, prompt in enumerate(prompts)]
    with quietly(model), torch.no_grad():
        found = HarnessModel(model, tokenizer, batch_size=2).generate_until(requests)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            for _ in range(5):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        written = tokenizer.decode(ids[0, -5:], skip_special_tokens=False)
        end = tokenizer.decode([tokenizer.eos_token_id])
        assert text == written.split(end)[0].split("\n")[0]


def tiny_jet_nemotron(vocab_size):
    """A random model of our Hugging Face class with both kinds of attention."""
    from jetlab.hf import JetNemotronConfig, JetNemotronForCausalLM

    config = JetNemotronConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        layer_kinds=["jetblock", "attention", "sliding_attention"],
        efficient_attention_config={
            "sliding_attention": {"window_size": 4},
            "jetblock": {"num_heads": 2, "head_dim": 8, "head_dim_v": 12, "dconv_generator_reduction": 8},
        },
    )
    torch.manual_seed(0)
    return JetNemotronForCausalLM(config).eval()


@pytest.mark.slow
def test_models_scored_on_two_devices_score_as_on_one(folder, tokenizer, tmp_path):
    saved = {f"teacher {i}": ROOT / f"assets/teacher/{i}" for i in (0, 1)}
    options = {"include_path": folder, "limit": 6}
    one = benchmarks.score_models(saved, [CHOICES, LIKELIHOOD], on=["cpu"], **options)
    two = benchmarks.score_models(saved, [CHOICES, LIKELIHOOD], on=["cpu", "cpu"], **options)
    assert one == two
    assert {name: [row.name for row in rows] for name, rows in one.items()} == {
        name: ["knowledge", "retrieval"] for name in saved
    }
