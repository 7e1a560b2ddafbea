"""Streams of packed text: order, resumption in mid-file, mixture, damaged files, the hub. No socket is opened."""

import gzip
import json
import math
import random
import socket
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jetlab.config import Corpus, Source
from jetlab.data import corpus as module
from jetlab.data.corpus import DamagedFile, PackedCorpus
from jetlab.ops.packing import check_documents

SEQ_LEN = 64


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a test opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Seconds that were waited before reading again; none of them passes."""
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    return waited


def texts(name, n, longest=150):
    """`n` documents that are all different, of 10 to `longest` bytes: shorter than a row and longer than two."""
    draw = random.Random(name)
    return [f"{name}{i:04d} " + "".join(draw.choices("abcdef ", k=draw.randint(3, longest - 7))) for i in range(n)]


def write(path, documents):
    """A parquet or JSON-lines file, compressed where the name says so, with a column beside the text."""
    if path.suffix == ".parquet":
        table = {"id": list(range(len(documents))), "text": pa.array(documents, pa.string())}
        pq.write_table(pa.table(table), path, row_group_size=20)
        return path
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def folder_of(tmp_path, name, n_files, n_documents=30, suffix=".parquet"):
    """A source of `n_files` files and all its documents."""
    folder = tmp_path / name
    folder.mkdir()
    documents = texts(name, n_files * n_documents)
    for i in range(n_files):
        write(folder / f"{i:02d}{suffix}", documents[i * n_documents : (i + 1) * n_documents])
    return Source(name=name, weight=1.0, column="text", files=[f"{folder}/*{suffix}"]), documents


def corpus_of(*sources, n_streams=4, rows_per_step=8, seq_len=SEQ_LEN, on_damage="skip"):
    return Corpus(
        sources=list(sources), seq_len=seq_len, rows_per_step=rows_per_step, n_streams=n_streams, on_damage=on_damage
    )


def one_file(path, on_damage="skip", column="text", others=()):
    """A corpus of one stream that reads `path`, and after it the files `others`."""
    files = [str(path), *map(str, others)]
    source = Source(name="web", weight=1.0, column=column, files=files)
    return corpus_of(source, n_streams=1, rows_per_step=1, on_damage=on_damage)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Two sources: 6 parquet files and 5 of compressed JSON lines, weights 3 to 1."""
    tmp_path = tmp_path_factory.mktemp("mixture")
    web, web_texts = folder_of(tmp_path, "web", 6)
    code, code_texts = folder_of(tmp_path, "code", 5, suffix=".jsonl.gz")
    sources = web.model_copy(update={"weight": 3.0}), code
    return SimpleNamespace(corpus=corpus_of(*sources), texts={"web": web_texts, "code": code_texts})


def global_rows(corpus, tokenizer, steps, world_size=1, state=None, seed=0):
    """Rows of `steps` over all processes in order of their index, one list of (index, ids, cu_seqlens, source)."""
    processes = [PackedCorpus(corpus, tokenizer, seed=seed, rank=r, world_size=world_size) for r in range(world_size)]
    rows = []
    for process in processes:
        if state is not None:
            process.load_state_dict(state)
    for step in steps:
        step_rows = [row for process in processes for row in process.rows(step)]
        rows += sorted((row.index, row.ids.tolist(), row.cu_seqlens.tolist(), row.source) for row in step_rows)
    return rows, processes


def united(processes):
    """One state of all processes, as it comes back from a file."""
    states = [process.state_dict() for process in processes]
    streams = {stream: entry for state in states for stream, entry in state["streams"].items()}
    return json.loads(json.dumps({"step": states[0]["step"], "streams": streams}))


def documents_of(corpus, tokenizer, n_steps, seed=0):
    """Documents by (stream, source), in the order in which rows give them back; the last one may be cut."""
    ids = defaultdict(list)
    for index, row, _, source in global_rows(corpus, tokenizer, range(n_steps), seed=seed)[0]:
        ids[index % corpus.n_streams, source] += row
    found = {}
    for key, tokens in ids.items():
        ends = [-1] + [i for i, token in enumerate(tokens) if token == tokenizer.eos_token_id]
        found[key] = [tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(ends)]
    return found


def first_documents(corpus, tokenizer, n):
    """The first `n` documents of a corpus of one stream and one source, and what was damaged on the way."""
    process, tokens, step = PackedCorpus(corpus, tokenizer, seed=0), [], 0
    while tokens.count(tokenizer.eos_token_id) < n:
        tokens += process.rows(step)[0].ids.tolist()
        step += 1
    return tokenizer.decode(tokens).split(tokenizer.eos_token)[:n], process.damaged


# Order and packing


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(mixture, tokenizer):
    first, _ = global_rows(mixture.corpus, tokenizer, range(4))
    again, _ = global_rows(mixture.corpus, tokenizer, range(4))
    other, _ = global_rows(mixture.corpus, tokenizer, range(4), seed=1)
    assert first == again
    assert first != other


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_read_the_batch_of_one_process(mixture, tokenizer, world_size):
    alone, _ = global_rows(mixture.corpus, tokenizer, range(5))
    together, processes = global_rows(mixture.corpus, tokenizer, range(5), world_size)
    assert together == alone
    assert [row[0] for row in alone] == [*range(8)] * 5
    n_rows = [len(process.rows(5)) for process in processes]
    assert n_rows == [8 // world_size] * world_size


def test_rows_have_the_asked_length_and_every_document_ends_at_a_boundary(mixture, tokenizer):
    rows, _ = global_rows(mixture.corpus, tokenizer, range(6))
    for _, ids, cu_seqlens, _ in rows:
        assert len(ids) == SEQ_LEN
        check_documents(torch.tensor(cu_seqlens), 1, SEQ_LEN)
        after_ends = {i + 1 for i, token in enumerate(ids) if token == tokenizer.eos_token_id}
        assert after_ends | {0, SEQ_LEN} == set(cu_seqlens)


def test_rows_of_a_stream_and_source_give_the_documents_back_in_the_order_of_their_files(mixture, tokenizer):
    found = documents_of(mixture.corpus, tokenizer, 20)
    assert len(found) == 8
    for (_, source), documents in found.items():
        places = [mixture.texts[source].index(text) for text in documents]  # fails if a text is not one of the source's
        assert len(places) > 3
        assert all(b == a + 1 or b % 30 == 0 for a, b in pairwise(places))


def test_a_document_longer_than_rows_goes_on_in_the_next_ones(tmp_path, tokenizer):
    long = "x" * (3 * SEQ_LEN) + "y"
    process = PackedCorpus(one_file(write(tmp_path / "a.jsonl", [long])), tokenizer, seed=0)
    rows = [process.rows(step)[0] for step in range(4)]
    assert [row.cu_seqlens.tolist() for row in rows] == [[0, SEQ_LEN]] * 3 + [[0, 2, SEQ_LEN]]
    assert tokenizer.decode(rows[3].ids[:2]) == "y" + tokenizer.eos_token


def test_an_empty_text_is_left_out_and_is_no_damage(tmp_path, tokenizer):
    corpus = one_file(write(tmp_path / "a.jsonl", ["one", "", "two"]))
    assert first_documents(corpus, tokenizer, 4) == (["one", "two"] * 2, [])


def test_an_end_token_written_in_a_text_does_not_end_its_document(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [f"one {tokenizer.eos_token} two"])
    row = PackedCorpus(one_file(path), tokenizer, seed=0).rows(0)[0]
    n = len(f"one {tokenizer.eos_token} two") + 1
    assert row.cu_seqlens.tolist()[:2] == [0, n]
    assert row.ids[:n].tolist().index(tokenizer.eos_token_id) == n - 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8-sig")
    assert first_documents(one_file(tmp_path / "a.jsonl"), tokenizer, 1) == (["one"], [])


def test_row_shares_follow_the_weights(mixture, tokenizer):
    n_steps = 100
    rows, _ = global_rows(mixture.corpus, tokenizer, range(n_steps))
    share = sum(source == "web" for *_, source in rows) / len(rows)
    error = math.sqrt(0.75 * 0.25 / len(rows))
    assert abs(share - 0.75) < 3 * error  # binomial; the seed is fixed, so this does not flicker


# Epochs


def test_an_epoch_reads_each_document_once_and_the_next_one_in_another_order(tmp_path, tokenizer):
    source, expected = folder_of(tmp_path, "web", 6, n_documents=5)
    (documents,) = documents_of(corpus_of(source, n_streams=1, rows_per_step=1), tokenizer, 120).values()
    first, second = documents[:30], documents[30:60]
    assert sorted(first) == sorted(second) == sorted(expected)
    assert first != second


def test_as_many_files_as_streams_part_by_file(tmp_path, tokenizer):
    source, _ = folder_of(tmp_path, "web", 4)
    found = documents_of(corpus_of(source), tokenizer, 4)
    files = {stream: {int(text[3:7]) // 30 for text in documents} for (stream, _), documents in found.items()}
    assert sorted(map(tuple, files.values())) == [(0,), (1,), (2,), (3,)]


def test_fewer_files_than_streams_lose_no_document_and_give_none_twice(tmp_path, tokenizer):
    source, expected = folder_of(tmp_path, "web", 3, n_documents=21)
    found = documents_of(corpus_of(source), tokenizer, 40)
    first = []
    for (stream, _), documents in found.items():
        n = 3 * len(range(stream, 21, 4))  # of each file, those whose index is the stream's modulo 4
        assert sorted(documents[:n]) == sorted(documents[n : 2 * n])  # both epochs are there
        first += documents[:n]
    assert sorted(first) == sorted(expected)


def test_a_source_without_a_document_in_an_epoch_is_refused(tmp_path, tokenizer):
    corpus = one_file(write(tmp_path / "a.parquet", ["", ""]))
    with pytest.raises(
        ValueError, match=r"source web gave stream 0 no document in a whole epoch of 1 files .*a\.parquet"
    ):
        PackedCorpus(corpus, tokenizer, seed=0).rows(0)


def test_a_wrong_column_is_named_when_the_source_gives_nothing(tmp_path, tokenizer):
    corpus = one_file(write(tmp_path / "a.parquet", ["one"]), column="content")
    with pytest.raises(ValueError, match=r"last damage: .*content.*check its column \(content\)"):
        PackedCorpus(corpus, tokenizer, seed=0).rows(0)


# Resumption


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stopped", [1, 7])
def test_a_run_of_two_processes_goes_on_bit_for_bit_on_any_number(mixture, tokenizer, stopped, world_size):
    undisturbed, _ = global_rows(mixture.corpus, tokenizer, range(20))
    begun, processes = global_rows(mixture.corpus, tokenizer, range(stopped), world_size=2)
    state = united(processes)
    assert any(at["used"] for entry in state["streams"].values() for at in entry["sources"].values())  # in mid-document
    rest, _ = global_rows(mixture.corpus, tokenizer, range(stopped, 20), world_size, state)
    assert begun + rest == undisturbed


def test_every_step_of_a_run_can_be_resumed_over_the_end_of_epochs_and_damage(tmp_path, tokenizer):
    write(tmp_path / "a.parquet", texts("a", 3))
    write(tmp_path / "c.jsonl", [*texts("c", 4), None, *texts("d", 2)])
    cracked_jsonl(tmp_path / "b.jsonl")
    source = Source(name="web", weight=1.0, column="text", files=[f"{tmp_path}/*"])
    corpus = corpus_of(source, n_streams=2, rows_per_step=2)
    process, states, rows = PackedCorpus(corpus, tokenizer, seed=0), [], []
    for step in range(40):
        states.append(process.state_dict())
        rows.append([row.ids.tolist() for row in process.rows(step)])
    assert max(entry["sources"]["web"]["epoch"] for entry in states[-1]["streams"].values()) > 1
    for step, state in enumerate(states):
        process.load_state_dict(state)
        assert [row.ids.tolist() for row in process.rows(step)] == rows[step]
    damages = sorted((damage.n_documents_read, damage.reason[:4]) for damage in process.damaged)
    assert damages == [(4, "colu"), (25, "Unte")]  # as often as a file is read: once each


def test_resuming_opens_the_file_at_the_position(tmp_path, tokenizer, monkeypatch):
    process = PackedCorpus(one_file(write(tmp_path / "a.jsonl", texts("a", 200))), tokenizer, seed=0)
    for step in range(60):
        process.rows(step)
    state = process.state_dict()
    (at,) = state["streams"]["0"]["sources"].values()
    assert 0 < at["document"] < 150
    starts, real = [], module._open
    monkeypatch.setattr(module, "_open", lambda *args: starts.append(args[2]) or real(*args))
    process.load_state_dict(state)
    process.rows(60)
    assert starts == [at["document"]]


def test_a_run_resumed_behind_the_last_text_of_an_epoch_knows_that_there_was_one(tmp_path, tokenizer):
    corpus = one_file(write(tmp_path / "a.jsonl", ["x" * (SEQ_LEN - 1), ""]))
    expected, processes = global_rows(corpus, tokenizer, [0])
    rows, _ = global_rows(corpus, tokenizer, [1], state=united(processes))
    assert rows == expected


def test_steps_come_in_order(mixture, tokenizer):
    process = PackedCorpus(mixture.corpus, tokenizer, seed=0)
    process.rows(0)
    with pytest.raises(ValueError, match=r"the next one is 1, got 0; .*load_state_dict"):
        process.rows(0)


def test_a_state_without_a_stream_of_this_process_is_refused(mixture, tokenizer):
    state = PackedCorpus(mixture.corpus, tokenizer, seed=0, rank=0, world_size=2).state_dict()
    other = PackedCorpus(mixture.corpus, tokenizer, seed=0, rank=1, world_size=2)
    with pytest.raises(ValueError, match=r"lacks streams 1, 3 .*unite"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "change", [{"seq_len": 32}, {"n_streams": 8}, {"rows_per_step": 16}, {"sources": 1}, {"seed": 1}]
)
def test_a_state_of_another_corpus_is_refused(mixture, tokenizer, change):
    state = PackedCorpus(mixture.corpus, tokenizer, seed=0).state_dict()
    state["streams"] |= {str(s): state["streams"]["0"] for s in range(4, 8)}
    seed = change.pop("seed", 0)
    if n := change.get("sources"):
        change = {"sources": mixture.corpus.sources[:n]}
    other = PackedCorpus(mixture.corpus.model_copy(update=change), tokenizer, seed=seed)
    with pytest.raises(ValueError, match="belongs to another corpus"):
        other.load_state_dict(state)


def test_a_state_survives_a_move_of_its_files_but_not_another_content(tmp_path, tokenizer):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", ["one", "x" * 500])
    process = PackedCorpus(one_file(tmp_path / "here/a.jsonl"), tokenizer, seed=0)
    process.rows(0)
    moved = PackedCorpus(one_file(tmp_path / "there/a.jsonl"), tokenizer, seed=0)
    moved.load_state_dict(process.state_dict())
    assert moved.rows(1)[0].ids.tolist() == process.rows(1)[0].ids.tolist()
    write(tmp_path / "there/a.jsonl", ["one", "short"])
    moved.load_state_dict(process.state_dict())
    with pytest.raises(ValueError, match=r"no longer what it was .* 124 tokens of document 1 .*restore the files"):
        moved.rows(2)


# Damage


def cracked_jsonl(path):
    """25 documents, a line cut short, 15 more."""
    lines = write(path, texts("b", 40)).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:25], lines[25][:20] + b"\n", *lines[26:]]))


def cracked_parquet(path):
    """600 documents in row groups of 300, of which the second cannot be decoded."""
    pq.write_table(pa.table({"id": list(range(600)), "text": texts("b", 600)}), path, row_group_size=300)
    start = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(bytes(data))


def cut_parquet(path):
    path.write_bytes(write(path, texts("b", 60)).read_bytes()[:-300])


def cut_gzip(path):
    path.write_bytes(write(path, texts("b", 60)).read_bytes()[:-60])


def latin_1(path):
    path.write_bytes('{"text": "caf\u00e9"}\n'.encode("latin-1"))


def no_column(path):
    pq.write_table(pa.table({"content": ["one", "two"]}), path)


DAMAGES = [
    pytest.param("b.jsonl", cracked_jsonl, 25, "Unterminated string", id="a-line-cut-short"),
    pytest.param(
        "b.jsonl", lambda path: path.write_text('["a list"]\n'), 0, "one JSON object", id="a-line-of-another-kind"
    ),
    pytest.param("b.jsonl", latin_1, 0, "codec can't decode", id="another-encoding"),
    pytest.param("b.jsonl", lambda path: path.write_bytes(b""), 0, "no document", id="no-bytes-as-json"),
    pytest.param("b.parquet", lambda path: path.write_bytes(b""), 0, "0 bytes", id="no-bytes-as-parquet"),
    pytest.param("b.parquet", lambda path: write(path, []), 0, "no document", id="no-rows"),
    pytest.param("b.parquet", cut_parquet, 0, "magic bytes", id="parquet-without-its-end"),
    pytest.param("b.parquet", cracked_parquet, 300, "deserialize thrift", id="a-broken-row-group"),
    pytest.param("b.parquet", no_column, 0, "text", id="a-column-that-is-not-there"),
    pytest.param("b.jsonl.gz", cut_gzip, 0, "end-of-stream", id="gzip-cut-short"),
    pytest.param("b.jsonl.gz", lambda path: path.write_bytes(b'{"text": "a"}\n'), 0, "gzip", id="not-gzip"),
]


@pytest.mark.parametrize(("name", "spoil", "n_read", "reason"), DAMAGES)
def test_a_damaged_file_is_used_up_to_the_damage_reported_once_and_left(
    tmp_path, tokenizer, capsys, pauses, name, spoil, n_read, reason
):
    spoil(tmp_path / name)
    whole = write(tmp_path / "a.parquet", texts("a", 5))
    documents, damaged = first_documents(one_file(tmp_path / name, others=[whole]), tokenizer, 3 * (5 + n_read))
    assert sorted(documents) == sorted([*texts("a", 5), *texts("b", n_read)] * 3)
    (damage,) = damaged
    assert (damage.file, damage.source, damage.n_documents_read) == (str(tmp_path / name), "web", n_read)
    assert reason in damage.reason
    assert capsys.readouterr().err == f"{damage}; the rest of the file is left out\n"
    assert pauses == []


@pytest.mark.parametrize(("name", "spoil", "n_read", "reason"), DAMAGES)
def test_a_damaged_file_stops_the_run_where_that_is_asked(tmp_path, tokenizer, name, spoil, n_read, reason):
    spoil(tmp_path / name)
    process = PackedCorpus(one_file(tmp_path / name, on_damage="stop"), tokenizer, seed=0)
    with pytest.raises(DamagedFile, match=rf"{name} of source web, document {n_read}: .*set on_damage: skip") as raised:
        for step in range(1000):
            process.rows(step)
    assert reason in raised.value.damage.reason


@pytest.mark.parametrize("value", [None, 7, ["a"]])
def test_a_document_without_text_is_left_out_alone_and_its_file_reported_once(tmp_path, tokenizer, capsys, value):
    corpus = one_file(write(tmp_path / "a.jsonl", ["one", value, "two", value]))
    documents, (damage,) = first_documents(corpus, tokenizer, 4)
    assert documents == ["one", "two"] * 2
    assert damage.n_documents_read == 1
    assert "column text is" in damage.reason
    assert capsys.readouterr().err == f"{damage}; such a document is left out\n"
    with pytest.raises(DamagedFile, match=r"document 1: column text is .*not text"):
        first_documents(corpus.model_copy(update={"on_damage": "stop"}), tokenizer, 4)


def test_a_null_in_parquet_and_a_line_without_the_column_are_such_documents(tmp_path, tokenizer):
    path = write(tmp_path / "a.parquet", ["one", None, "two"])
    assert first_documents(one_file(path), tokenizer, 2)[0] == ["one", "two"]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"id": 3}\n\n{"text": "two"}\n')
    documents, (damage,) = first_documents(one_file(path), tokenizer, 2)
    assert documents == ["one", "two"]
    assert damage.n_documents_read == 1


def test_where_damage_begins_is_the_same_in_every_reading_and_from_every_start(tmp_path):
    """pyarrow decodes in threads: read in smaller pieces, 300 documents come before this error or now and then none."""
    path = tmp_path / "b.parquet"
    cracked_parquet(path)
    for start in [0, 1, 299, 300] * 15:
        values = module._open(str(path), "text", start)
        assert [next(values) for _ in range(start, 300)] == texts("b", 600)[start:300]
        with pytest.raises(OSError, match="deserialize"):
            next(values)


def test_an_empty_row_group_is_no_damage(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
        for documents in (["one"], [], ["two"]):
            writer.write_table(pa.table({"text": pa.array(documents, pa.string())}))
    assert pq.ParquetFile(path).num_row_groups == 3
    assert first_documents(one_file(path), tokenizer, 4) == (["one", "two"] * 2, [])


def test_other_columns_may_change_their_type_within_a_file(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    lines = [{"text": f"{i} " + "x" * 300, "meta": None if i < 5000 else {"url": [i]}} for i in range(5010)]
    path.write_text("\n".join(map(json.dumps, lines)))
    values = [text for text in module._open(str(path), "text", 4990)]
    assert values == [line["text"] for line in lines[4990:]]


def test_a_failed_step_leaves_the_state_before_it(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "a.jsonl", texts("a", 40))
    corpus = one_file(tmp_path / "a.jsonl")
    expected, _ = global_rows(corpus, tokenizer, range(3))
    process = PackedCorpus(corpus, tokenizer, seed=0)
    process.rows(0)
    before, real = process.state_dict(), module._Reader.take

    def interrupted(reader, n):
        real(reader, n)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module._Reader, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.rows(1)
    assert process.state_dict() == before
    assert [process.rows(step)[0].ids.tolist() for step in (1, 2)] == [ids for _, ids, *_ in expected[1:]]


# Reaching the data

INTERRUPTIONS = [
    ConnectionResetError(104, "Connection reset by peer"),
    TimeoutError("read timed out"),
    httpx.ReadTimeout("the read operation timed out"),
    OSError(5, "Input/output error"),
    FileNotFoundError("Unable to find 'a.jsonl'"),
]


def flaky(monkeypatch, failures):
    """Reading ends with the next of `failures` after two documents, as long as there are any."""
    real, starts = module._open, []

    def read(file, column, start):
        starts.append(start)
        for i, value in enumerate(real(file.removeprefix("hf://"), column, start)):
            if i == 2 and failures:
                raise failures.pop(0)
            yield value

    monkeypatch.setattr(module, "_open", read)
    return starts


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_a_file_that_cannot_be_reached_is_read_on_after_growing_pauses(tmp_path, tokenizer, monkeypatch, pauses, error):
    corpus = one_file(write(tmp_path / "a.jsonl", texts("a", 9)), on_damage="stop")
    starts = flaky(monkeypatch, [error, error])
    assert first_documents(corpus, tokenizer, 9) == (texts("a", 9), [])
    assert starts[:3] == [0, 2, 4]
    assert pauses == [1, 1]  # two documents came in between, so the second failure is a first one again


def test_a_file_out_of_reach_ends_the_run_with_a_way_out_and_is_no_damage(tmp_path, tokenizer, monkeypatch, pauses):
    process = PackedCorpus(one_file(write(tmp_path / "a.jsonl", texts("a", 9))), tokenizer, seed=0)

    def unreachable(*_):
        raise RuntimeError("streaming failed") from httpx.ConnectError("no route")
        yield

    monkeypatch.setattr(module, "_open", unreachable)
    with pytest.raises(ConnectionError, match=r"a\.jsonl of source web .* 5 attempts, document 0: .*check network"):
        process.rows(0)
    assert pauses == [1, 5, 25, 60]
    assert process.damaged == []


@pytest.mark.parametrize(("n_failures", "n_damaged"), [(1, 0), (2, 1)])
def test_a_remote_file_counts_as_damaged_only_if_a_second_reading_fails_at_the_same_place(
    tmp_path, tokenizer, monkeypatch, n_failures, n_damaged
):
    path = write(tmp_path / "a.jsonl", texts("a", 9))
    monkeypatch.setattr(module, "_hub_files", lambda source: [f"hf://{path}"])
    corpus = corpus_of(Source(name="web", weight=1.0, column="text", hub_id="x/y"), n_streams=1, rows_per_step=1)
    real, failures = module._open, [ValueError("unexpected end")] * n_failures

    def read(file, column, start):
        values = list(real(file.removeprefix("hf://"), column, start))
        yield from values[: max(4 - start, 0)]
        if failures:
            raise failures.pop()
        yield from values[max(4 - start, 0) :]

    monkeypatch.setattr(module, "_open", read)
    documents, damaged = first_documents(corpus, tokenizer, 6)
    assert len(damaged) == n_damaged
    assert documents == (texts("a", 4) + texts("a", 2) if n_damaged else texts("a", 6))


def test_an_error_of_another_kind_is_neither_damage_nor_an_interruption(tmp_path, tokenizer, monkeypatch, pauses):
    process = PackedCorpus(one_file(write(tmp_path / "a.jsonl", texts("a", 9))), tokenizer, seed=0)
    flaky(monkeypatch, [MemoryError("out of memory")])
    with pytest.raises(MemoryError):
        process.rows(0)
    assert (process.damaged, pauses) == ([], [])


# Files and the hub


def test_a_data_set_in_the_hub_s_layout_is_read_like_files(tmp_path, tokenizer):
    """A folder stands for the hub: the library finds its files and their kind in the same way."""
    (tmp_path / "set/data").mkdir(parents=True)
    for name in ("train-1", "train-0", "test-0"):
        write(tmp_path / f"set/data/{name}.parquet", texts(name, 20))
    source = Source(name="web", weight=1.0, column="text", hub_id=str(tmp_path / "set"))
    assert [file.rsplit("/", 1)[1] for file in module.source_files(source)] == ["train-0.parquet", "train-1.parquet"]
    documents, _ = first_documents(corpus_of(source, n_streams=1, rows_per_step=1), tokenizer, 40)
    assert sorted(documents) == sorted(texts("train-0", 20) + texts("train-1", 20))


def builder(monkeypatch, name="parquet", files=("hf://datasets/x/y@1a/b.parquet", "hf://datasets/x/y@1a/a.parquet")):
    """The hub answers with a data set of this kind; the questions it was asked are returned."""
    asked = []

    def load(hub_id, **options):
        asked.append((hub_id, options))
        return SimpleNamespace(name=name, config=SimpleNamespace(data_files={"train": list(files)}))

    monkeypatch.setattr(module.datasets, "load_dataset_builder", load)
    return asked


def test_files_of_the_hub_are_those_of_the_split_at_the_revision(monkeypatch):
    asked = builder(monkeypatch)
    source = Source(name="web", weight=1.0, column="text", hub_id="x/y", subset="s", revision="1a")
    assert module.source_files(source) == ["hf://datasets/x/y@1a/a.parquet", "hf://datasets/x/y@1a/b.parquet"]
    assert asked == [("x/y", {"name": "s", "revision": "1a"})]


def test_files_of_the_hub_need_no_ending_that_tells_their_kind(monkeypatch):
    builder(monkeypatch, name="json", files=["hf://datasets/x/y@1a/documents/0.gz"])
    source = Source(name="web", weight=1.0, column="text", hub_id="x/y")
    assert module.source_files(source) == ["hf://datasets/x/y@1a/documents/0.gz"]


@pytest.mark.parametrize(
    ("kind", "split", "rule"),
    [
        pytest.param("webdataset", "train", "parquet or JSON lines, got webdataset; download it", id="kind"),
        pytest.param("parquet", "test", "has the splits train, got split 'test'", id="split"),
    ],
)
def test_a_data_set_of_the_hub_that_cannot_be_read_is_refused(monkeypatch, kind, split, rule):
    builder(monkeypatch, name=kind)
    with pytest.raises(ValueError, match=rule):
        module.source_files(Source(name="web", weight=1.0, column="text", hub_id="x/y", split=split))


def test_a_data_set_that_the_hub_does_not_give_is_refused_with_the_way_to_its_terms():
    source = Source(name="web", weight=1.0, column="text", hub_id="nobody/no-such-set")
    with pytest.raises(
        ValueError, match=r"nobody/no-such-set could not be looked up .*HF_HUB_OFFLINE.*accept its terms"
    ):
        module.source_files(source)


def test_patterns_are_sorted_without_repeats_and_names_with_brackets_are_meant_literally(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl", "note.txt"):
        write(tmp_path / name, ["one"])
    patterns = [f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl", f"{tmp_path}/odd[1].jsonl"]
    files = module.source_files(Source(name="web", weight=1.0, column="text", files=patterns))
    assert [file.rsplit("/", 1)[1] for file in files] == ["a.jsonl", "b.jsonl", "odd[1].jsonl"]
    assert list(module._open(files[2], "text", 0)) == ["one"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("note.txt", r"end in \.parquet, .*note\.txt"),
        ("a.jsonl.zstd", "pip install zstandard"),
        ("*.none", "no file matches"),
    ],
)
def test_files_that_are_missing_or_have_no_reader_are_refused(tmp_path, monkeypatch, name, rule):
    for file in ("note.txt", "a.jsonl.zstd"):
        write(tmp_path / file, ["one"])
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rule):
        module.source_files(Source(name="web", weight=1.0, column="text", files=[f"{tmp_path}/{name}"]))


def test_a_tokeniser_without_an_end_token_is_refused(mixture):
    with pytest.raises(ValueError, match=r"has none .*set tokenizer\.eos_token"):
        PackedCorpus(mixture.corpus, SimpleNamespace(eos_token_id=None), seed=0)


@pytest.mark.parametrize(
    ("rank", "world_size", "rule"), [(0, 3, "multiple .* got 4 and 3"), (2, 2, "from 0 to 1, got 2")]
)
def test_processes_that_cannot_share_the_streams_are_refused(mixture, tokenizer, rank, world_size, rule):
    with pytest.raises(ValueError, match=rule):
        PackedCorpus(mixture.corpus, tokenizer, seed=0, rank=rank, world_size=world_size)
