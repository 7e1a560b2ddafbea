"""The starting point: a small Qwen2 that masters every task, as the study's pretrained full-attention model."""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from jetlab.config import TeacherStudy
from jetlab.data.packing import Batch, Mixture
from jetlab.data.tokenizer import build_tokenizer
from jetlab.models import surgery
from jetlab.parallel import parallel_map
from jetlab.paths import ROOT, replacing, require, resolve
from jetlab.seeding import generator
from jetlab.tasks import build_tasks
from jetlab.train.loop import Resume, adamw, fit
from jetlab.train.losses import answer_loss
from jetlab.train.muon import Muon
from jetlab.train.paths import difficulty


def teacher_config(
    *,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    d_ff: int,
    pad_token_id: int,
) -> Qwen2Config:
    """A Qwen2 configuration of the study's size, with tied embeddings."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=d_ff,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=pad_token_id + 1,
    )


def initialise(model: Qwen2ForCausalLM, seed: int) -> None:
    """Embeddings of standard deviation 0.5 and a final norm of 0.25, so that tied logits start small.

    With Hugging Face's 0.02, AdamW and bf16 autocast the induction step, in which recall is learned, did not come within
    7,000 steps of 66 K tokens (two seeds; records/h200/teacher).
    """
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 0.5, generator=generator(seed, "embeddings"))
        model.model.norm.weight.fill_(0.25)


def take_over(model: Qwen2ForCausalLM, tokenizer, folder: str | Path) -> None:
    """Copy the weights of the model in `folder`, of the same shape; tokens that its vocabulary lacks keep their own.

    So a trained teacher learns tasks that came later, without the induction step's lottery (assets/teacher/README.md).
    Raises ValueError if the shapes differ.
    """
    before, known = surgery.load(resolve(folder))
    weights = before.state_dict()
    embeddings = model.model.embed_tokens.weight.detach().clone()
    shared = [
        (index, known.get_vocab()[token])
        for token, index in tokenizer.get_vocab().items()
        if token in known.get_vocab()
    ]
    new, old = map(list, zip(*shared, strict=True))
    if weights["model.embed_tokens.weight"].shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"{folder} has another width than teacher.training.d_model = {embeddings.shape[1]}; change one"
        )
    embeddings[new] = weights["model.embed_tokens.weight"][old]
    weights |= {"model.embed_tokens.weight": embeddings, "lm_head.weight": embeddings}
    model.load_state_dict(weights)


class Steps(Dataset):
    """Step number to batch, with contexts that grow from a tenth to the full size over the share `growth` of the steps."""

    def __init__(self, mixture: Mixture, n_steps: int, growth: float):
        self.mixture, self.n_steps, self.growth = mixture, n_steps, growth

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, step: int) -> Batch:
        return self.mixture.batch(step, difficulty=difficulty(self.growth * self.n_steps, step))


def muon_and_adamw(
    model: PreTrainedModel, muon_learning_rate: float, learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for all linear maps inside the layers, gates and kernel generators among them; AdamW for the rest."""
    maps = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    matrices = [module.weight for module in maps]
    chosen = set(map(id, matrices))
    rest = adamw((p for p in model.parameters() if id(p) not in chosen), learning_rate, weight_decay=0.01)
    rate = muon_learning_rate
    if matrices[0].is_cuda:
        rate = torch.tensor(rate, device=matrices[0].device)  # which a captured step can read
    return [Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.0), rest]


def train_teacher(
    config: Qwen2Config,
    mixture: Mixture,
    *,
    seed: int,
    n_steps: int,
    learning_rate: float,
    muon_learning_rate: float,
    warmup: int,
    weights: dict[str, float],
    growth: float,
    start: str | None = None,
    device: str = "cpu",
    n_workers: int = 0,
    label: str = "teacher",
    resume: Resume | None = None,
) -> tuple[PreTrainedModel, list[dict]]:
    """Train on the answers of all tasks, from random weights or those in the folder `start`.

    Returns the model on the CPU and the loss curve.

    Muon on the matrices of the layers, AdamW on the rest; fp32, with TF32 products on a GPU. `n_workers`
    processes make the batches. Under bf16 autocast Muon and growing contexts brought recall of 48 pairs within 1,000
    steps; AdamW with the same contexts and 3,000 steps did not learn it (one run each).
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = Qwen2ForCausalLM(config)
    initialise(model, seed)
    if start is not None:
        take_over(model, mixture.tokenizer, start)
    model.to(device).train()
    if torch.device(device).type == "cuda":  # a small model waits for launches: one compiled layer serves all
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimisers = muon_and_adamw(model, muon_learning_rate, learning_rate)
    steps = Steps(mixture, n_steps, growth)
    feed = iter(DataLoader(steps, batch_size=None, num_workers=n_workers)) if n_workers else None

    def loss_at(step: int):
        batch = steps[step] if feed is None else next(feed)
        position, target, which = batch.targets()  # before the move: on a GPU each look-up would wait for the device
        hidden = model.model(input_ids=batch.ids.to(device), use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[position.to(device)])
        which = {name: rows.to(device) for name, rows in which.items()}
        return answer_loss(logits, target.to(device), which, weights), {}

    if feed is not None and resume is not None:
        raise ValueError("a run with workers cannot resume: set n_workers to 0, or pass no resume file")
    history = fit(
        model.named_parameters(), optimisers, loss_at, n_steps=n_steps, label=label, warmup=warmup, log_every=20, resume=resume
    )  # fmt: skip
    plain = Qwen2ForCausalLM(config)  # without compiled layers
    plain.load_state_dict(model.state_dict())
    return plain.eval(), history


def provide(study: TeacherStudy, out_dir: str | Path) -> list[str]:
    """The folders of the study's teachers, by `teacher.source`.

    bundled: assets/teacher/0 …; hub: the model is read from the Hugging Face hub once, as safetensors and without its
    code, and written to `out_dir`/teacher/0 in bfloat16, so that later stages need no network; train: each teacher is
    trained and written to `out_dir`/teacher/0 …. `out_dir`/teacher/source.json says where they are from.
    Raises MissingInput for a bundled teacher that is not there.
    """
    read = {"source": study.source}
    match study.source:
        case "bundled":
            folders = [
                str(require(f"assets/teacher/{i}", "teacher").relative_to(ROOT)) for i in range(study.n_teachers)
            ]
        case "hub":
            folder = Path(out_dir) / "teacher" / "0"
            model, tokenizer = surgery.load(study.hub_id, revision=study.hub_revision)
            read |= {"hub_id": study.hub_id, "commit": getattr(model.config, "_commit_hash", None)}
            model.to(torch.bfloat16).save_pretrained(
                resolve(folder), max_shard_size="1TB"
            )  # one file, as `load` reads it
            tokenizer.save_pretrained(resolve(folder))
            folders = [str(folder)]
        case "train":
            train = partial(_train_into, out_dir=str(out_dir), study=study)
            folders = parallel_map(train, range(study.n_teachers), n_threads=study.common.n_threads)
    with replacing(Path(out_dir) / "teacher" / "source.json") as temporary:
        temporary.write_text(json.dumps(read, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folders


def _train_into(index: int, out_dir: str, study: TeacherStudy) -> str:
    folder = Path(out_dir) / "teacher" / str(index)
    training, seed = study.training, study.common.seed + index
    tokenizer = build_tokenizer()
    config = teacher_config(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **training.model_dump(include={"d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff"}),
    )
    mixture = Mixture(build_tasks(training.sizes), training.rows, tokenizer, study.tasks.seq_len, seed)
    resume = None if training.n_workers else Resume(f"teacher-{index}", [study.model_dump(), index])
    model, history = train_teacher(
        config,
        mixture,
        seed=seed,
        device=study.common.device,
        label=f"teacher {index}",
        start=None if training.start is None else f"{training.start}/{index}",
        resume=resume,
        **training.model_dump(
            include={"n_steps", "learning_rate", "muon_learning_rate", "warmup", "weights", "growth", "n_workers"}
        ),
    )
    resolve(folder).mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, training.dtype)).save_pretrained(resolve(folder))
    tokenizer.save_pretrained(resolve(folder))
    pd.DataFrame(history).to_csv(resolve(folder) / "loss.csv", index=False, float_format="%.5g")
    if resume is not None:
        resume.clear()
    return str(folder)
