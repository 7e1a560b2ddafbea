"""Text for training on 1 … N GPUs: streams of packed rows whose order depends on the seed alone.

    row g of a step       comes from stream s = g mod n_streams
    row k of a stream     comes from one source, drawn with probability weight / Σ weights
    a source's documents  follow one another, each with an end token behind it, cut into rows of seq_len tokens

A stream knows nothing of the others, and belongs to process s mod n_processes: a step's rows are the same on any number
of processes that divides n_streams. Files are read with Hugging Face `datasets`, streaming: local parquet or JSON lines,
or those of a data set of the hub.
"""

import glob
import json
import lzma
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate, chain
from pathlib import PurePath
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor

from jetlab.config import Corpus, Source
from jetlab.paths import ROOT, resolve, shown
from jetlab.seeding import derive, rng

LINES = (".jsonl", ".json", *(f".{kind}.{packed}" for kind in ("jsonl", "json") for packed in ("gz", "zst", "zstd")))
PAUSES_S = (1, 5, 25, 60)  # before a file is opened again after a failure to reach it
N_TOGETHER = 32  # documents tokenised at once: on one core 5 M tokens/s instead of 4 M for one at a time


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a step: `ids` [seq_len] and `cu_seqlens` [n_documents + 1], int64, as `jetlab.ops.packing` reads them."""

    index: int  # g, from 0 to rows_per_step - 1
    ids: Tensor
    cu_seqlens: Tensor
    source: str


@dataclass(frozen=True)
class Damage:
    """What could not be read: a file from document `n_documents_read` on, or that document alone, as `reason` says."""

    file: str
    source: str
    n_documents_read: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} of source {self.source}, document {self.n_documents_read}: {self.reason}"


class DamagedFile(ValueError):
    """A file that cannot be read on, where the corpus says on_damage: stop."""

    def __init__(self, damage: Damage):
        self.damage = damage
        super().__init__(f"{damage}; mend the file or set on_damage: skip")


class Position(NamedTuple):
    """Where the next token of a source comes from, within one stream."""

    epoch: int = 0
    file: int = 0  # place in the stream's order of this epoch
    document: int = 0  # index within the file
    used: int = 0  # tokens of that document which rows have taken already
    n_documents: int = 0  # that the stream has taken from the source in this epoch


class PackedCorpus:
    """The rows of `corpus` that process `rank` of `world_size` reads, step by step; resumes at the exact token.

    A document cut at the end of a row goes on in the next row of its source and stream, there as a document of its own:
    neither recurrent state nor attention reaches over the cut.
    `damaged` lists what could not be read, each file once. With on_damage "skip" the documents before the damage are used,
    the rest of the file is not, in every epoch. Damage begins with a line, or with the parquet row group or the piece of
    1 MiB that cannot be decoded; a file without any document counts as damaged. A document that is null or not text is
    left out alone, and the first one of a file is reported.
    Raises ValueError for a number of streams that world_size does not divide, a rank out of range, a tokeniser without
    an end token, and sources whose files cannot be found or have no reader.
    """

    def __init__(self, corpus: Corpus, tokenizer, *, seed: int, rank: int = 0, world_size: int = 1):
        if world_size < 1 or corpus.n_streams % world_size:
            raise ValueError(
                f"n_streams must be a multiple of the number of processes, got {corpus.n_streams} and {world_size}; "
                f"set n_streams: {max(world_size, 1)} or start another number of processes"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be from 0 to {world_size - 1}, got {rank}; pass the process's rank of its group"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "documents are parted by the tokeniser's end token, and this one has none (eos_token is None); "
                "set tokenizer.eos_token to one of its special tokens"
            )
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs each damage, which is reported here
        self.corpus, self.seed, self.step = corpus, seed, 0
        self.streams = range(rank, corpus.n_streams, world_size)
        self.shared = _Shared(corpus, tokenizer, seed)
        self.readers = {
            s: {x.name: _Reader(self.shared, x, s, Position()) for x in corpus.sources} for s in self.streams
        }

    @property
    def damaged(self) -> list[Damage]:
        return list(self.shared.damaged.values())

    def rows(self, step: int) -> list[Row]:
        """This process's rows of `step`, in the order of their index. Steps come one after the other, from 0.

        Raises ValueError for a step out of order and for a source without a document in a whole epoch, DamagedFile where
        damage is to stop the run, ConnectionError if a file cannot be reached in several attempts. The state is then
        that before the call.
        """
        if step != self.step:
            raise ValueError(
                f"steps come in order: the next one is {self.step}, got {step}; "
                "to go on elsewhere, load_state_dict with the state saved before that step"
            )
        before = self.state_dict()
        try:
            rows = [self._row(g) for g in range(self.corpus.rows_per_step) if g % self.corpus.n_streams in self.readers]
        except BaseException:
            self.load_state_dict(before)
            raise
        self.step += 1
        return rows

    def _row(self, index: int) -> Row:
        n_streams, sources = self.corpus.n_streams, self.corpus.sources
        stream = index % n_streams
        k = self.step * (self.corpus.rows_per_step // n_streams) + index // n_streams
        draw = rng(self.seed, "source", stream, k)
        source = draw.choices([x.name for x in sources], [x.weight for x in sources])[0]
        pieces = self.readers[stream][source].take(self.corpus.seq_len)
        return Row(
            index=index,
            ids=torch.from_numpy(np.concatenate(pieces)),
            cu_seqlens=torch.tensor(list(accumulate(map(len, pieces), initial=0))),
            source=source,
        )

    def state_dict(self) -> dict:
        """JSON-able: the next step, and the position of every source in each of this process's streams.

        The states of several processes make one by uniting their `streams`.
        """
        return {
            "step": self.step,
            "streams": {
                str(stream): {
                    "corpus": self.shared.fingerprint,
                    "sources": {name: reader.position._asdict() for name, reader in readers.items()},
                }
                for stream, readers in self.readers.items()
            },
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state`, which holds at least this process's streams, whatever number of processes wrote it.

        Raises ValueError if streams are missing or the state is another corpus's: seed, rows, sources and names of files
        must be the same.
        """
        if missing := [stream for stream in self.streams if str(stream) not in state["streams"]]:
            raise ValueError(
                f"the state lacks streams {', '.join(map(str, missing))} of this process; "
                "unite the `streams` of all processes that saved it"
            )
        saved = {stream: state["streams"][str(stream)] for stream in self.streams}
        if any(entry["corpus"] != self.shared.fingerprint for entry in saved.values()):
            raise ValueError(
                "the state belongs to another corpus: seed, seq_len, rows_per_step, n_streams, the sources or their files "
                "differ; restore those of the run that saved it, or start at step 0"
            )
        self.step = state["step"]
        self.readers = {
            stream: {
                source.name: _Reader(self.shared, source, stream, Position(**entry["sources"][source.name]))
                for source in self.corpus.sources
            }
            for stream, entry in saved.items()
        }


@dataclass
class _Shared:
    """What the readers of a process have in common: the files of each source, the tokeniser, the list of damage."""

    corpus: Corpus
    tokenizer: object
    seed: int
    damaged: dict[tuple, Damage] = field(default_factory=dict)

    def __post_init__(self):
        self.files = {source.name: source_files(source) for source in self.corpus.sources}
        parts = [
            [source.name, source.weight, source.column, [_identity(file) for file in self.files[source.name]]]
            for source in self.corpus.sources
        ]
        c = self.corpus
        self.fingerprint = derive("corpus", self.seed, c.seq_len, c.rows_per_step, c.n_streams, parts)

    def report(self, damage: Damage, *, whole: bool, cause: Exception | None = None) -> None:
        """Raises DamagedFile with on_damage "stop"; else notes the first damage of a file, and the first such document."""
        if self.corpus.on_damage == "stop":
            raise DamagedFile(damage) from cause
        if (key := (damage.source, damage.file, whole)) not in self.damaged:
            self.damaged[key] = damage
            print(f"{damage}; {'the rest of the file' if whole else 'such a document'} is left out", file=sys.stderr)


class _Reader:
    """The tokens of one source for one stream, from `position` on, without end.

    Every epoch has a seeded order of the files. File i of it is read by stream i mod n_streams; of fewer files than
    streams each is read by every stream, which takes the documents whose index is the stream's mod n_streams.
    """

    def __init__(self, shared: _Shared, source: Source, stream: int, position: Position):
        self.shared, self.source, self.stream, self.position = shared, source, stream, position
        self.n_streams, self.files = shared.corpus.n_streams, shared.files[source.name]
        self.splits_files = len(self.files) < self.n_streams
        self.ids: np.ndarray | None = None  # of the document at `position`
        self.documents = self._documents(position)

    def take(self, n: int) -> list[np.ndarray]:
        """The next `n` tokens, one array a document."""
        pieces = []
        while n:
            if self.ids is None:
                self._next_document()
            at = self.position
            piece = self.ids[at.used : at.used + n]
            pieces.append(piece)
            n -= len(piece)
            self.position = at._replace(used=at.used + len(piece))
            if self.position.used == len(self.ids):
                self.position = Position(at.epoch, at.file, at.document + 1, 0, at.n_documents + 1)
                self.ids = None
        return pieces

    def _next_document(self) -> None:
        found, self.ids = next(self.documents)
        used = self.position.used  # above 0 only after a state was loaded in the middle of a document
        if used and (found != self.position._replace(used=0) or used >= len(self.ids)):
            raise ValueError(
                f"source {self.source.name} is no longer what it was when the state was saved: stream {self.stream} had used "
                f"{used} tokens of document {self.position.document} in file {self.position.file} of its order, and they "
                "are not there; restore the files and the tokeniser, or start at step 0"
            )
        self.position = found._replace(used=used)

    def _documents(self, at: Position) -> Iterator[tuple[Position, np.ndarray]]:
        epoch, file, document, _, n = at
        while True:
            order = rng(self.shared.seed, self.source.name, epoch).sample(self.files, len(self.files))
            order = order if self.splits_files else order[self.stream :: self.n_streams]
            while file < len(order):
                for index, ids in self._tokenised(order[file], document):
                    yield Position(epoch, file, index, 0, n), ids
                    n += 1
                file, document = file + 1, 0
            if n == 0:
                raise ValueError(self._empty(order))
            epoch, file, n = epoch + 1, 0, 0

    def _empty(self, order: list[str]) -> str:
        reasons = [str(damage) for damage in self.shared.damaged.values() if damage.source == self.source.name]
        files = ", ".join(map(shown, order[:3])) + (", …" if len(order) > 3 else "")
        return (
            f"source {self.source.name} gave stream {self.stream} no document in a whole epoch of {len(order)} files "
            f"({files}); {'last damage: ' + reasons[-1] + '; ' if reasons else ''}check its column "
            f"({self.source.column}) and files, or use fewer streams than {self.n_streams}"
        )

    def _tokenised(self, file: str, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Index and tokens of each document from `start` on, its end token included; those without a token are left out."""
        texts = self._texts(file, start)
        while some := [pair for _, pair in zip(range(N_TOGETHER), texts, strict=False)]:
            batch = self.shared.tokenizer(
                [text for _, text in some],
                add_special_tokens=False,
                split_special_tokens=True,  # "<end>" within a text is text: it must not end the document
                return_attention_mask=False,
                verbose=False,
            )
            for (index, _), ids in zip(some, batch["input_ids"], strict=True):
                if ids:
                    yield index, np.array([*ids, self.shared.tokenizer.eos_token_id])

    def _texts(self, file: str, start: int) -> Iterator[tuple[int, str]]:
        """Index and text of this stream's documents of a file, from `start` on."""
        for index, value in self._values(file, start):
            if self.splits_files and index % self.n_streams != self.stream:
                continue
            if isinstance(value, str):
                yield index, value
            else:
                what = "null or missing" if value is None else f"of type {type(value).__name__}"
                reason = f"column {self.source.column} is {what}, not text"
                self.shared.report(Damage(shown(file), self.source.name, index, reason), whole=False)

    def _values(self, file: str, start: int) -> Iterator[tuple[int, object]]:
        """Index and value of the column in every document of a file, from `start` on, up to its end or damage.

        A file that cannot be reached is opened again after growing pauses; after the last, ConnectionError is raised.
        What seems damage in a remote file may be an answer cut short, so it counts if a second reading ends there too.
        """
        index, n_failures, suspect = start, 0, None
        while True:
            try:
                for value in _open(file, self.source.column, index):
                    yield index, value
                    index, n_failures = index + 1, 0
                if index == 0:
                    raise ValueError("there is no document in it")
                return
            except Exception as error:
                if _is_unreachable(error):
                    if n_failures == len(PAUSES_S):
                        raise ConnectionError(
                            f"{shown(file)} of source {self.source.name} could not be reached in {n_failures + 1} attempts, "
                            f"document {index}: {_reason(error)}; check network, access to the data set and free file "
                            "handles, then start again from the last checkpoint"
                        ) from error
                    time.sleep(PAUSES_S[n_failures])
                    n_failures += 1
                elif not _is_damage(error):
                    raise
                elif "://" in file and suspect != index:
                    suspect = index
                else:
                    damage = Damage(shown(file), self.source.name, index, _reason(error))
                    self.shared.report(damage, whole=True, cause=error)
                    return


def _open(file: str, column: str, start: int) -> Iterator[object]:
    """The column's value in every document of a file, from document `start` on.

    JSON lines are read as lines, and each is parsed here: the JSON reader of `datasets` fixes the types of all columns by
    its first megabytes, so that a column of no interest which changes its type later would look like damage.
    """
    options = {"data_files": file if "://" in file else glob.escape(file), "split": "train", "streaming": True}
    parquet = file.endswith(".parquet")
    if parquet:
        # One row group after the other, each as a whole: pyarrow reads ahead in threads, so that within a row group, or
        # across them, it is chance how many documents come before an error; where damage begins must not be.
        documents = datasets.load_dataset("parquet", columns=[column], batch_size=1 << 30, **options).reshard()
    else:
        documents = datasets.load_dataset("text", encoding="utf-8-sig", chunksize=1 << 20, **options)
    for document in documents.skip(start) if start else documents:
        yield document[column] if parquet else _of_line(document["text"], column)


def _of_line(line: str, column: str) -> object:
    if not line.strip():
        return ""
    document = json.loads(line)
    if not isinstance(document, dict):
        raise ValueError(f"a line must hold one JSON object, got {line[:40]!r}")
    return document.get(column)


UNREACHABLE = {
    "aiohttp",
    "fsspec",
    "http",
    "httpcore",
    "httpx",
    "huggingface_hub",
    "requests",
    "socket",
    "ssl",
    "urllib3",
}
DAMAGE = (ValueError, OSError, EOFError, KeyError, zlib.error, lzma.LZMAError, datasets.exceptions.DatasetsError)


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is of the way to the data and not of the data.

    The operating system's errors have a number; those that pyarrow and gzip raise for broken contents have none.
    """
    while error is not None:
        module = type(error).__module__.partition(".")[0]
        if module in UNREACHABLE or isinstance(
            error, ConnectionError | TimeoutError | FileNotFoundError | PermissionError
        ):
            return True
        if isinstance(error, OSError) and error.errno is not None:
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_damage(error: Exception) -> bool:
    return isinstance(error, DAMAGE) or type(error).__module__.partition(".")[0] in ("pyarrow", "zstandard")


def _reason(error: Exception) -> str:
    """The first line of an error's message, for a report. pyarrow quotes raw bytes; those are shown as '?'."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(letter if letter.isprintable() else "?" for letter in lines[0][:200])


def source_files(source: Source) -> list[str]:
    """The sorted files of a source. Raises ValueError if there is none, or one that no reader is known for."""
    files = sorted(_hub_files(source) if source.files is None else set(chain(*map(_matches, source.files))))
    for file in files:
        if source.files is not None and not file.endswith(
            (".parquet", *LINES)
        ):  # on the hub the data set tells the kind
            raise ValueError(
                f"files of a source end in .parquet, {', '.join(LINES)}, got {shown(file)} of source {source.name}; "
                "give a pattern that leaves it out, or convert it"
            )
        if file.endswith((".zst", ".zstd")) and find_spec("zstandard") is None:
            raise ValueError(f"{shown(file)} of source {source.name} needs zstandard: pip install zstandard")
    return files


def _matches(pattern: str) -> list[str]:
    """Files of this machine that a pattern from the root matches; a name that exists is meant as it stands."""
    if resolve(pattern).is_file():
        return [str(resolve(pattern))]
    found = [resolve(name) for name in glob.glob(pattern, root_dir=ROOT, recursive=True)]
    if not (files := [str(path) for path in found if path.is_file()]):
        raise ValueError(
            f"no file matches {pattern}; give a path or pattern from the repository's root, or an absolute one"
        )
    return files


def _hub_files(source: Source) -> list[str]:
    """Addresses of the data files of a source's split on the hub.

    Raises ValueError if the data set cannot be found, is not stored as parquet or JSON lines, or lacks the split.
    """
    name = f"{source.hub_id}{f', subset {source.subset}' if source.subset else ''}"
    try:
        builder = datasets.load_dataset_builder(source.hub_id, name=source.subset, revision=source.revision)
    except Exception as error:
        raise ValueError(
            f"data set {name} could not be looked up on the hub: {_reason(error)}; check hub_id, subset, revision and "
            "HF_HUB_OFFLINE, and for a gated data set accept its terms there and run `hf auth login`"
        ) from error
    if builder.name not in ("parquet", "json"):
        raise ValueError(
            f"data set {name} must be stored as parquet or JSON lines, got {builder.name}; "
            "download it, convert it to parquet and give it as files"
        )
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise ValueError(f"data set {name} has the splits {', '.join(splits) or 'none'}, got split {source.split!r}")
    return [str(file) for file in splits[source.split]]


def _identity(file: str) -> str:
    """What a file is recognised by when a run goes on: its address on the hub, or its name, so that folders may move."""
    return file if "://" in file else PurePath(file).name
