"""The whole of params.yaml, typed: one frozen model per section, and one study per stage that joins those it reads.

Unknown and missing keys, wrong types and numbers out of range are refused with the rule, the value and the way out.
"""

from math import gcd
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from jetlab.layers.jetblock import VARIANTS
from jetlab.seeding import seed_everything
from jetlab.tasks import TASKS, build_tasks

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]


class ConfigError(ValueError):
    """A section of params.yaml that breaks a rule."""


class StudyModel(BaseModel):
    """Frozen, strict about types, and closed: a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def from_params(cls, **values) -> Self:
        """Check and build. Raises ConfigError with one line per broken rule: key, value, rule, way out."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [_explain(cls, detail) for detail in error.errors()]
            raise ConfigError(
                f"{cls.__name__}: " + "; ".join(lines) + " (see params.yaml and jetlab/config.py)"
            ) from None


def _explain(cls: type, detail: dict) -> str:
    key = ".".join(map(str, detail["loc"])) or cls.__name__
    match detail["type"]:
        case "missing":
            return f"{key} is missing: add it to its section"
        case "extra_forbidden":
            return f"{key} is no known key: remove it, or correct its name"
        case "float_type" | "int_type" if isinstance(detail["input"], str):
            return f"{key} must be a number, got the text {detail['input']!r}: write it as 1.0e-3, without quotes"
        case _:
            return f"{key}: {detail['msg'].removeprefix('Value error, ')}, got {detail['input']!r}"


class Common(StudyModel):
    profile: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "laptop"  # every result carries it; a report mixes no two
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    n_threads: Count  # torch threads of a process; one is fastest at the laptop's sizes
    path: Literal["paper", "found"]  # whether later stages use the paper's choice of block or the study's own
    device: Literal["cpu", "cuda"]

    def apply(self) -> None:
        """Seed every global generator and set the threads of this process: the first thing that a stage does."""
        import torch

        seed_everything(self.seed)
        torch.set_num_threads(self.n_threads)


class Tasks(StudyModel):
    seq_len: Annotated[int, Field(ge=32)]  # tokens of a training row
    sizes: dict[str, dict[str, int | float]]  # per scored task, how much a context holds at full difficulty
    n_contexts: dict[Literal["search", "select", "test"], Count]  # examples per split and task
    n_questions: Count  # questions asked of a context, at most

    @model_validator(mode="after")
    def _tasks_exist(self) -> Self:
        build_tasks(self.sizes)
        return self


class Source(StudyModel):
    """One set of documents: files of this machine, or a data set of the Hugging Face hub, read as a stream."""

    name: Annotated[str, Field(min_length=1)]  # in reports
    weight: Annotated[float, Field(gt=0)]  # share of the tokens, relative to the other sources'
    column: Annotated[str, Field(min_length=1)]  # that holds the text
    files: Annotated[list[str], Field(min_length=1)] | None = (
        None  # paths or patterns from the root; parquet or JSON lines
    )
    hub_id: str | None = None
    subset: str | None = None  # the data set's configuration
    split: str = "train"
    revision: str | None = None  # commit of the data set; without it the newest, which may change under a run

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.files is None) == (self.hub_id is None):
            raise ValueError(f"source {self.name!r} needs either files or hub_id; give one of them")
        if self.files is not None and (self.subset or self.revision):
            raise ValueError(f"source {self.name!r} reads files, which have no subset or revision; leave them out")
        return self


class Corpus(StudyModel):
    """A mixture of sources, read as rows of `seq_len` tokens by `n_streams` readers that know nothing of one another.

    A step's row g comes from stream g mod n_streams, and stream s is read by process s mod n_processes: so the rows of a
    step are the same on any number of processes that divides n_streams.
    """

    sources: Annotated[list[Source], Field(min_length=1)]
    seq_len: Annotated[int, Field(ge=2)]  # tokens of a packed row
    rows_per_step: Count  # rows of a step, over all processes
    n_streams: Count
    on_damage: Literal["skip", "stop"]  # what an unreadable file does: it is left out and reported, or ends the run

    @model_validator(mode="after")
    def _rows_divide(self) -> Self:
        if self.rows_per_step % self.n_streams:
            raise ValueError(
                f"rows_per_step must be a multiple of n_streams, got {self.rows_per_step} and {self.n_streams}; "
                f"try n_streams: {gcd(self.rows_per_step, self.n_streams)}"
            )
        names = [source.name for source in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each source needs a name of its own, got {', '.join(twice)} more than once")
        return self


class Text(StudyModel):
    """Training on text instead of tasks, on one GPU or many: `jetlab.train.main` under torchrun."""

    n_processes: Count  # one a GPU
    precision: Literal["float32", "bfloat16"]  # of products and activations; weights and sums of gradients stay float32
    recompute: bool  # activations in the backward pass, one layer at a time
    checkpoint_steps: Annotated[
        int, Field(ge=10, multiple_of=10)
    ]  # between two checkpoints; every tenth step is logged
    seq_len: Annotated[int, Field(ge=2)]
    rows_per_step: Count
    rows_at_once: Count  # of a process's rows, how many the model reads together
    n_streams: Count
    on_damage: Literal["skip", "stop"]
    sources: Annotated[list[Source], Field(min_length=1)]  # of PostNAS and stage 1
    stage2_sources: Annotated[list[Source], Field(min_length=1)]  # of stage 2
    stage2_label_weight: Annotated[float, Field(ge=0, le=1)]  # of next-token cross-entropy in stage 2; the rest is KL

    def corpus(self, stage: Literal[1, 2] = 1) -> Corpus:
        """What a stage reads."""
        shared = self.model_dump(include={"seq_len", "rows_per_step", "n_streams", "on_damage"})
        return Corpus(sources=self.sources if stage == 1 else self.stage2_sources, **shared)

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.seq_len

    @model_validator(mode="after")
    def _streams_divide(self) -> Self:
        if self.n_streams % self.n_processes:
            raise ValueError(
                f"n_streams must be a multiple of n_processes, got {self.n_streams} and {self.n_processes}; "
                f"try n_streams: {self.n_processes * max(1, self.n_streams // self.n_processes)}"
            )
        if self.rows_per_step % (self.n_processes * self.rows_at_once):
            raise ValueError(
                f"rows_per_step must be a multiple of n_processes · rows_at_once, got {self.rows_per_step}, {self.n_processes} "
                f"and {self.rows_at_once}; try rows_at_once: {gcd(self.rows_per_step // self.n_processes, self.rows_at_once)}"
            )
        self.corpus(1), self.corpus(2)
        return self


class Dims(StudyModel):
    n_heads: Count
    head_dim: Count  # key width of one head
    head_dim_v: Count  # value width of one head

    def block(self, d_model: int, **others) -> BlockDims:
        return BlockDims(d_model, self.n_heads, self.head_dim, self.head_dim_v, **others)


class Training(StudyModel):
    n_local: Annotated[int, Field(ge=0)]  # steps of layer-local alignment
    n_steps: Count  # steps end to end
    learning_rate: Rate
    warmup: Count  # steps
    feature_weight: Annotated[float, Field(ge=0)]  # of the distance of hidden states
    logit_weight: Annotated[float, Field(ge=0)]  # of the KL of the answers
    rows: dict[str, Count]  # rows of each task in a step
    weights: dict[str, float]  # of a task's KL in the loss; 1 where not named
    growth: Annotated[float, Field(ge=0, lt=1)]  # share of the steps end to end over which contexts grow to full size

    @model_validator(mode="after")
    def _rows_name_tasks(self) -> Self:
        unknown = sorted((set(self.rows) | set(self.weights)) - set(TASKS))
        if unknown:
            raise ValueError(f"rows and weights must name tasks among {', '.join(TASKS)}, got {', '.join(unknown)}")
        if not self.feature_weight and not self.logit_weight:
            raise ValueError("feature_weight and logit_weight are both 0, so nothing would train: give one a weight")
        return self


class ScratchTraining(StudyModel):
    """Of a hybrid from random weights, by the teacher's recipe."""

    n_steps: Count
    learning_rate: Rate  # of AdamW
    muon_learning_rate: Rate  # of Muon
    warmup: Count
    growth: Annotated[float, Field(ge=0, lt=1)]
    rows: dict[str, Count]
    weights: dict[str, float]


class TeacherTraining(StudyModel):
    d_model: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    d_ff: Count
    n_steps: Count
    learning_rate: Rate  # of AdamW, for embeddings, norms and biases
    muon_learning_rate: Rate  # of Muon, for the matrices of the layers
    warmup: Count
    n_workers: Annotated[int, Field(ge=0)]  # processes that make batches
    growth: Annotated[float, Field(ge=0, lt=1)]  # share of the steps over which contexts grow to full size
    start: str | None  # folder that holds 0, 1, …: models to go on from
    dtype: Literal["float32", "bfloat16"]  # of the weights that are written
    rows: dict[str, Count]
    weights: dict[str, float]
    sizes: dict[str, dict[str, int | float]]  # task sizes in training: at least those of `tasks.sizes`


class NemotronPhase(StudyModel):
    name: Annotated[str, Field(min_length=1)]
    n_steps: Count
    muon_learning_rate: Rate  # of the matrices of the layers
    growth: Annotated[float, Field(ge=0, lt=1)]  # share of the steps over which contexts grow to full size
    rows: Annotated[dict[str, Count], Field(min_length=1)]  # of each task in a step


class NemotronTraining(StudyModel):
    """Shape and training of the small NemotronH."""

    layers: str  # M Mamba2, - MLP, * attention
    d_model: Count
    d_ff: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    mamba_heads: Count
    mamba_head_dim: Count
    state_size: Count  # width of a Mamba head's keys
    n_groups: Count  # of Mamba heads that share keys and queries
    chunk_size: Count  # tokens that the scan takes at once
    phases: Annotated[list[NemotronPhase], Field(min_length=1)]
    learning_rate: Rate  # of AdamW, for embeddings, norms and biases
    warmup: Count  # steps, in each phase
    n_workers: Annotated[int, Field(ge=0)]  # processes that make batches
    weights: dict[str, float]
    sizes: dict[str, dict[str, int | float]]  # task sizes in training: at least those of `tasks.sizes`


class Study(StudyModel):
    """What every stage reads."""

    common: Common
    tasks: Tasks


class TrainingStudy(Study):
    """A stage that trains new paths: on tasks, or on the text that `text` describes."""

    text: Text | None = None

    def _check_data(self, training: Training) -> None:
        if self.text is not None and (training.rows or training.weights or training.growth):
            raise ValueError(
                "training on text takes no rows, weights or growth of tasks; write rows: {}, weights: {} and growth: 0.0, "
                "or text: null"
            )


class TeacherStudy(Study):
    source: Literal["bundled", "hub", "train"]
    n_teachers: Annotated[int, Field(ge=1, le=8)]
    hub_id: str | None  # a model of the Hugging Face hub, for source: hub
    hub_revision: str | None  # its commit; null: the newest
    training: TeacherTraining  # for source: train

    @model_validator(mode="after")
    def _hub_has_an_id_and_one_model(self) -> Self:
        if self.source == "hub" and not self.hub_id:
            raise ValueError("source: hub needs hub_id, for example Qwen/Qwen2.5-1.5B")
        if self.source == "hub" and self.n_teachers != 1:
            raise ValueError(f"a hub id names one model, so source: hub needs n_teachers: 1, got {self.n_teachers}")
        return self


class SupernetStudy(TrainingStudy):
    block: str  # kind of the linear path
    dims: Dims
    n_seeds: Count  # supernets of each teacher
    law: Literal["coin", "fixed_k", "up_to_k", "sandwich"]  # of drawing paths
    max_full: Annotated[int, Field(ge=0)]  # full layers of a sampled path: what k or the coin means is the law's
    n_checks: Annotated[int, Field(ge=0)]  # times that accuracy is measured on the way
    check_budget: Annotated[int, Field(ge=0, le=1)]  # placements of so many full layers at most are measured then
    training: Training

    @model_validator(mode="after")
    def _block_exists(self) -> Self:
        _require_linear(self.block)
        return self

    @model_validator(mode="after")
    def _data_fit(self) -> Self:
        self._check_data(self.training)
        if self.text is not None and self.n_checks:
            raise ValueError(
                f"checks on the way score a model that is on one device, so text needs n_checks: 0, got {self.n_checks}"
            )
        return self


Selector = Literal[
    "single_layer", "beam", "greedy_add", "greedy_remove", "kl", "logit_error", "gates", "uniform", "random", "exhaustive"
]  # fmt: skip


Variant = Literal[
    "coin", "fixed_k", "up_to_k", "sandwich", "no_features", "no_logits", "no_local", "no_local_no_growth", "another_seed"
]  # fmt: skip


class PlacementStudy(Study):
    supernet: SupernetStudy
    budget: Annotated[int, Field(ge=1, le=2)]  # full layers that later stages keep
    max_budget: Annotated[int, Field(ge=1, le=2)]  # budgets 1 … this are evaluated exhaustively
    select_budget: Count  # selectors are asked for budgets 1 … this
    selectors: Annotated[list[Selector], Field(min_length=1)]
    beam_width: Count
    gate_steps: Count  # steps in which gates train
    gate_learning_rate: Rate

    @model_validator(mode="after")
    def _kept_budget_is_evaluated(self) -> Self:
        if self.budget > self.max_budget:
            raise ValueError(
                f"budget must be at most max_budget = {self.max_budget}, got {self.budget}; raise max_budget"
            )
        return self

    @model_validator(mode="after")
    def _selectors_have_tasks(self) -> Self:
        asked = [name for name in ("gates", "logit_error") if name in self.selectors]
        if asked and not self.supernet.training.rows:
            raise ValueError(
                f"{' and '.join(asked)} among selectors need rows of tasks in supernet.training, which are none; leave it out"
            )
        return self


class AblationStudy(Study):
    """Supernets that differ from one base in one thing each."""

    supernet: SupernetStudy  # the base
    teachers: Annotated[list[str], Field(min_length=1)]  # folders
    variants: Annotated[list[Variant], Field(min_length=1)]  # the first is the base, named by its law
    budget: Annotated[int, Field(ge=1, le=2)]  # full layers: searched for, and evaluated exhaustively up to it

    @model_validator(mode="after")
    def _base_comes_first(self) -> Self:
        if self.variants[0] != self.supernet.law:
            raise ValueError(
                f"variants must begin with the base, its law {self.supernet.law!r}, with which the others are compared, "
                f"got {self.variants[0]!r}"
            )
        if twice := sorted({name for name in self.variants if self.variants.count(name) > 1}):
            raise ValueError(f"each variant is trained once, got {', '.join(twice)} more than once")
        return self


class CacheBudgetStudy(Study):
    """A supernet with three kinds of layer, searched under a budget of bytes."""

    supernet: SupernetStudy  # its law and max_full are not used: paths of three kinds have a law of their own
    teachers: Annotated[list[str], Field(min_length=1)]  # folders
    window: Count  # tokens that sliding attention sees
    context_tokens: Count  # length of context at which bytes are counted
    beam_width: Count
    budgets: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]  # full layers' bytes beyond all linear
    max_changed: Count  # layers that differ from the linear kind, at most; the model's depth: all architectures


class HybridStudy(TrainingStudy):
    """One hybrid at the found placement, trained with everything but its linear layers frozen."""

    dims: Dims
    training: Training

    @model_validator(mode="after")
    def _data_fit(self) -> Self:
        self._check_data(self.training)
        return self


class BlockStudy(HybridStudy):
    variant: str  # kind of the linear layers

    @model_validator(mode="after")
    def _block_exists(self) -> Self:
        _require_linear(self.variant)
        return self


class VariantStudy(HybridStudy):
    variant: Literal[tuple(VARIANTS)]  # convolutions of a JetBlock

    @property
    def options(self) -> dict:
        """Arguments of `JetBlock`."""
        return {name: value for name, value in VARIANTS[self.variant].items() if name != "conv_size"}

    def block(self, d_model: int) -> BlockDims:
        """The study's dims with the variant's number of taps, 4 where it names none."""
        return self.dims.block(d_model, conv_size=VARIANTS[self.variant].get("conv_size", 4))


class SizeStudy(TrainingStudy):
    """One point of the grid: named like `h4_k16_v16` for heads, key width and value width of a head."""

    state_size: Count  # numbers in a layer's state: n_heads · head_dim · head_dim_v, the same over the grid
    training: Training
    size: str

    @property
    def dims(self) -> Dims:
        return parse_size(self.size)

    @model_validator(mode="after")
    def _data_fit(self) -> Self:
        self._check_data(self.training)
        return self

    @model_validator(mode="after")
    def _state_is_equal(self) -> Self:
        dims = parse_size(self.size)
        held = dims.n_heads * dims.head_dim * dims.head_dim_v
        if held != self.state_size:
            raise ValueError(
                f"a size must hold state_size = {self.state_size} numbers, {self.size} holds {held}; change one of its widths"
            )
        return self


class Variants(StudyModel):
    """The entries of the matrix stages; the stages that compare them read the same lists."""

    blocks: Annotated[list[str], Field(min_length=1)]  # kinds of linear layers
    jetblock: Annotated[list[str], Field(min_length=1)]  # convolutions of a JetBlock
    sizes: Annotated[list[str], Field(min_length=1)]  # heads and widths, such as h4_k16_v16


class CompareStudy(Study):
    """A stage that compares the runs of a matrix."""

    names: list[str]


class CellStudy(TrainingStudy):
    """Many short runs that differ in few things: `jetlab.search.cells` lists them by family."""

    family: Literal["blocks", "jetblock", "contrasts", "sizes", "scratch", "final"]
    training: Training  # of linear layers alone; of family final the first stage
    scratch: ScratchTraining  # for family scratch
    stage2_steps: Count  # for family final, all weights
    stage2_learning_rate: Rate
    lengths: list[Annotated[int, Field(ge=0)]]  # for family final: characters of plain text that stretch a context
    dims: Dims  # of every cell whose family does not vary them
    state_size: Count  # of every size
    blocks: list[str]
    jetblock: list[str]
    sizes: list[str]
    teachers: Annotated[list[str], Field(min_length=1)]  # folders
    seeds: Annotated[list[int], Field(min_length=1)]
    learning_rates: list[Rate]  # of family blocks, each tried on `tuning_seed`; empty: the training's own
    tuning_seed: Annotated[int, Field(ge=0)]
    found: list[int]  # full layers of placement "found"
    placements: Annotated[list[Literal["found", "none", "uniform"]], Field(min_length=1)]
    n_workers: Count  # processes side by side

    @model_validator(mode="after")
    def _scratch_has_one_teacher(self) -> Self:
        if self.family == "scratch" and len(self.teachers) > 1:
            raise ValueError(
                "family scratch takes no weight of a teacher, so several teachers of one shape are the same run again: "
                f"give one, got {', '.join(self.teachers)}"
            )
        return self

    @model_validator(mode="after")
    def _seeds_are_fresh(self) -> Self:
        if self.learning_rates and self.tuning_seed in self.seeds:
            raise ValueError(
                f"tuning_seed {self.tuning_seed} chooses the rates, so it must not be among seeds: take another"
            )
        return self


class DistillStudy(TrainingStudy):
    dims: Dims  # chosen by the hardware stage
    block: str  # chosen by the jetblock stage
    stage1: Training  # only the linear layers train
    stage2_steps: Count
    stage2_learning_rate: Rate  # of all weights

    @model_validator(mode="after")
    def _block_exists(self) -> Self:
        _require_linear(self.block)
        return self

    @model_validator(mode="after")
    def _data_fit(self) -> Self:
        self._check_data(self.stage1)
        return self


class EvaluateStudy(Study):
    n_lm_eval: Count  # contexts per task that lm-eval scores beside our own scorer
    n_samples: Count  # generated samples per task
    lengths: list[Annotated[int, Field(ge=0)]]  # characters of plain text that stretch a context
    n_length_contexts: Count  # contexts per task, length and place of the text
    benchmarks: list[str]  # of the paper, by their names in paper/benchmarks.csv
    n_benchmark: Count | None  # documents of each of their tasks; None: all
    execute_code: bool  # whether programs that a model wrote may run on this machine, in processes with limits

    @model_validator(mode="after")
    def _benchmarks_exist(self) -> Self:
        from jetlab.evaluate.benchmarks import read_benchmarks, require_known

        require_known(self.benchmarks)
        risky = [name for name in self.benchmarks if read_benchmarks()[name].executes_code]
        if risky and not self.execute_code:
            raise ValueError(
                f"{', '.join(risky)} runs code that the model wrote; in a container set execute_code: true, or leave it out"
            )
        return self


class ThroughputStudy(StudyModel):
    common: Common
    contexts: list[Count]  # tokens
    n_decode: Count  # tokens decoded per measurement
    n_repeats: Count


class Compression(StudyModel):
    """Nemotron Nano 2's recipe (arXiv:2508.14444, Sec 4): the budget's setting, what may be removed, and how long to distil."""

    context: Count  # tokens at which the memory is counted
    batch: Count  # sequences at which the memory is counted
    n_calibration: Count  # batches of `rows` on which importance is measured
    aggregate: Literal["mean", "l2"]  # of activations over tokens
    depths: list[Annotated[int, Field(ge=0)]]  # layers to remove at full width, whether that fits the budget or not
    n_removed: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]  # layers that candidates may remove
    d_model: Annotated[list[Count], Field(min_length=1)]  # widths that are tried, the model's own among them or not
    d_ff: Annotated[list[Count], Field(min_length=1)]
    n_mamba_heads: Annotated[list[Count], Field(min_length=1)]  # multiples of the groups
    n_candidates: Count  # of those that fit, how many are distilled: the closest in logits
    rank_steps: Count  # of distillation, to rank candidates
    final_steps: Count  # of distillation, for the winner and each random pruning
    n_random: Count  # random prunings of the winner's bytes
    n_controls: Annotated[int, Field(ge=0)]  # more of them that keep its attention, and of the best narrowed candidate
    n_workers: Count  # processes for the last distillations
    learning_rate: Rate
    warmup: Count  # steps
    rows: Annotated[dict[str, Count], Field(min_length=1)]  # of each task in a step
    weights: dict[str, float]  # of a task's loss; 1 where not named


class AttentionSearch(StudyModel):
    """Jet-Nemotron's placement search on the mixers of a NemotronH."""

    law: Literal["coin", "fixed_k", "up_to_k", "sandwich"]  # that draws placements; k is what the model has
    beam_width: Count
    training: Training  # of the new mixers


class Nano2Study(Study):
    source: Literal["bundled", "train"]  # bundled: assets/nemotron; train: from random weights
    n_models: Count  # of different seeds
    training: NemotronTraining
    compression: Compression
    attention: AttentionSearch | None  # null: the committed record of it is shown


def check_params(params: dict[str, Any]) -> None:
    """Build every study that the sections of a params.yaml describe, one for each stage and entry of a matrix.

    Raises ConfigError, as the stage itself would, for the first section that breaks a rule, and for sections or lists of
    variants that are missing or unknown.
    """
    keys = ("common", "tasks", "text", "teacher", "supernet", "placement", "variants", "blocks", "jetblock", "hardware")
    _require_keys("params.yaml", params, (*keys, "distill", "evaluate", "throughput", "nano2"))
    every = {"common": params["common"], "tasks": params["tasks"]}
    training = every | {"text": params["text"]}
    _require_data(params)
    TeacherStudy.from_params(**every, **params["teacher"])
    supernet = SupernetStudy.from_params(**training, **params["supernet"])
    PlacementStudy.from_params(**every, supernet=supernet, **params["placement"])
    variants = Variants.from_params(**params["variants"])
    for variant in variants.blocks:
        BlockStudy.from_params(**training, **params["blocks"], variant=variant)
    for variant in variants.jetblock:
        VariantStudy.from_params(**training, **params["jetblock"], variant=variant)
    for size in variants.sizes:
        SizeStudy.from_params(**training, **params["hardware"], size=size)
    chosen = {"dims": params["blocks"]["dims"], "block": variants.blocks[0]}  # by earlier stages; any will do here
    DistillStudy.from_params(**training, **chosen, **params["distill"])
    EvaluateStudy.from_params(**every, **params["evaluate"])
    ThroughputStudy.from_params(common=params["common"], **params["throughput"])
    Nano2Study.from_params(**every, **params["nano2"])


def _require_data(params: dict[str, Any]) -> None:
    """Each training has something to train on: rows of tasks, or the text of the profile."""
    places = [(name, params[name].get("training")) for name in ("supernet", "blocks", "jetblock", "hardware")]
    for name, training in [*places, ("distill", params["distill"].get("stage1"))]:
        if params["text"] is None and isinstance(training, dict) and training.get("rows") == {}:
            raise ConfigError(f"{name}: rows must name a task to train on, got none; give rows, or text to train on")


def _require_keys(name: str, found: dict, expected: tuple[str, ...]) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in found]
    wrong += [f"{key} is no known section" for key in found if key not in expected]
    if wrong:
        raise ConfigError(f"{name}: {'; '.join(wrong)}; the sections are {', '.join(expected)}")


def parse_size(size: str) -> Dims:
    """`h4_k16_v32` -> 4 heads, key width 16, value width 32. Raises ValueError for another form."""
    parts = size.split("_")
    if [part[:1] for part in parts] != ["h", "k", "v"] or not all(part[1:].isdigit() for part in parts):
        raise ValueError(f"a size is written h<heads>_k<key width>_v<value width>, such as h4_k16_v16, got {size!r}")
    n_heads, head_dim, head_dim_v = (int(part[1:]) for part in parts)
    return Dims(n_heads=n_heads, head_dim=head_dim, head_dim_v=head_dim_v)


def _require_linear(kind: str) -> None:
    linear = [name for name in MIXERS if "attention" not in name]
    if kind not in linear:
        raise ValueError(f"a block must be one of {', '.join(linear)}, got {kind!r}")
