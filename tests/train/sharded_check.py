"""Run by torchrun from test_text.py: what each process holds of a sharded model, and the gradient of a step.

torchrun --nproc-per-node N tests/train/sharded_check.py FOLDER recompute|keep
"""

import json
import sys
from pathlib import Path

import torch
from text_jobs import DIMS, text, training
from torch.distributed.tensor import DTensor, Shard

from jetlab.data.corpus import PackedCorpus
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.train.paths import placement_kinds
from jetlab.train.ranks import shard, started
from jetlab.train.text import Ahead, PathStep, accumulated

folder, recompute = Path(sys.argv[1]), sys.argv[2] == "recompute"
with started("cpu") as ranks:
    study = text(folder / "data")
    model, tokenizer = surgery.load("assets/teacher/0")
    torch.manual_seed(1)
    surgery.wrap(model, "rwkv7", BlockDims(**DIMS))  # whose layers share the first one's values
    surgery.freeze(model)
    model.train()
    step = PathStep(model, training())
    shard(step, [model], ranks, precision="float32", recompute=recompute)
    parameters = list(model.parameters())
    report = {
        "world_size": ranks.world_size,
        "types": sorted({type(p).__name__ for p in parameters}),
        "shards": sorted({str(p.placements[0] == Shard(0)) for p in parameters if isinstance(p, DTensor)}),
        "held": sum(p.to_local().numel() for p in parameters),
        "whole": sum(p.numel() for p in parameters),
    }
    corpus = Ahead(PackedCorpus(study.corpus(1), tokenizer, seed=0, rank=ranks.rank, world_size=ranks.world_size))
    kinds = placement_kinds(model.config.num_hidden_layers, (3,), "rwkv7")
    steps = accumulated(corpus, ranks, study, [model], lambda _, ids, ends: step(ids, ends, kinds), 0)
    total = 0.0
    for loss in steps.losses_at(0):
        loss.backward()
        total += loss.detach()
    corpus.close()
    report["loss"] = float(steps.whole(torch.as_tensor(total)))
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    if ranks.is_first:
        torch.save(gradients, folder / f"gradients-{ranks.world_size}-{sys.argv[2]}.pt")
        (folder / f"report-{ranks.world_size}-{sys.argv[2]}.json").write_text(json.dumps(report))
