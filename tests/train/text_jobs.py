"""Small jobs on text for the tests of training under torchrun: local files, and the bundled teacher."""

import json
import random
from dataclasses import asdict
from pathlib import Path

from jetlab.config import Text, Training
from jetlab.layers.dims import BlockDims
from jetlab.train.main import PathsJob, WeightsJob

WORDS = "amber fox kettle owl lamp heron spoon tiger wagon zebra likes fears 1 2 3 = + is ?".split()
DIMS = asdict(BlockDims(64, n_heads=2, head_dim=8, head_dim_v=16))


def write_texts(folder: Path, n_files: int = 3, n_documents: int = 60) -> list[str]:
    """JSON lines with documents of 4 to 40 words -> paths."""
    draw, paths = random.Random(0), []
    for index in range(n_files):
        path = folder / f"part-{index}.jsonl"
        lines = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(4, 40)))} for _ in range(n_documents)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths.append(str(path))
    return paths


def text(folder: Path, **changed) -> Text:
    sources = [
        {"name": "lines", "weight": 3.0, "column": "text", "files": write_texts(folder)},
        {"name": "more", "weight": 1.0, "column": "text", "files": write_texts(folder, 1)},
    ]
    values = {
        "n_processes": 1,
        "precision": "float32",
        "recompute": False,
        "checkpoint_steps": 10,
        "seq_len": 48,
        "rows_per_step": 4,
        "rows_at_once": 1,
        "n_streams": 4,
        "on_damage": "stop",
        "sources": sources,
        "stage2_sources": sources,
        "stage2_label_weight": 0.5,
    }
    return Text.from_params(**values | changed)


def training(**changed) -> Training:
    values = {
        "n_local": 10,
        "n_steps": 20,
        "learning_rate": 3.0e-3,
        "warmup": 2,
        "feature_weight": 2.0,
        "logit_weight": 1.0,
        "rows": {},
        "weights": {},
        "growth": 0.0,
    }
    return Training.from_params(**values | changed)


def paths_job(folder: Path, text: Text, training: Training, **changed) -> PathsJob:
    values = {
        "folder": str(folder),
        "label": "supernet t0",
        "teacher": "assets/teacher/0",
        "text": text.model_dump(),
        "seed": 0,
        "device": "cpu",
        "block": "gated_deltanet",
        "dims": DIMS,
        "options": {},
        "layers": None,
        "init_seed": 1,
        "law": "up_to_k",
        "max_full": 2,
        "training": training.model_dump(),
    }
    return PathsJob.from_params(**values | changed)


def weights_job(folder: Path, text: Text, model: Path, **changed) -> WeightsJob:
    values = {
        "folder": str(folder),
        "label": "distill, stage 2",
        "teacher": "assets/teacher/0",
        "text": text.model_dump(),
        "seed": 0,
        "device": "cpu",
        "model": str(model),
        "n_steps": 20,
        "learning_rate": 1.0e-3,
        "warmup": 2,
    }
    return WeightsJob.from_params(**values | changed)
