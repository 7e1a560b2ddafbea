"""Generation at the speed of memory: a cache allocated once, prompts in chunks, a decoding step that is one CUDA graph.

Works for Qwen2, Qwen3, Llama, Gemma 3 (text), Mamba2 and Nemotron-H (without experts) of Transformers and for
JetNemotronForCausalLM with any of its mixers, all by the same code: the model's own forward runs, over the engine's cache,
attention and Mamba2. On a CPU the same class runs without graphs. Tokens are those of the model's `generate`; its
`generation_config` is not read, so ends and sampling are given here.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jetlab.inference import mamba2, memory
from jetlab.inference.attention import engaged
from jetlab.inference.cache import EngineCache, layer_kinds


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, as in Transformers: temperature, then the `top_k` likeliest, then what makes up `top_p`.

    `top_k` 0 and `top_p` 1 leave all tokens in. Raises ValueError for what is none of these.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature must be positive, top_k at least 0 and top_p in (0, 1], got {self.temperature}, {self.top_k} "
                f"and {self.top_p}; leave `sampling` out to be greedy"
            )

    def warpers(self) -> LogitsProcessorList:
        found = LogitsProcessorList()
        if self.temperature != 1.0:
            found.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            found.append(TopPLogitsWarper(self.top_p))
        return found


class Engine:
    """Generates with `model`, up to `batch_size` sequences at once of at most `max_len` tokens, prompt and answer together.

    prefill_chunk   tokens of a prompt read at once
    prefill_tokens  tokens of all rows together read at once, at least one row's chunk: further rows take their turn, which
                    bounds the activations
    state_dtype     format of the recurrent matrices between tokens; None: as the mixer returns them (fp32)
    graph           whether a decoding step is a CUDA graph; None: where the model is on a GPU
    The model is put into evaluation mode.
    Raises MemoryError with the bytes that are needed and there, and the largest batch that fits, before anything is
    allocated; ValueError for sizes below 1, a graph without a GPU, and for a model that the engine cannot run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_size: int,
        max_len: int,
        prefill_chunk: int = 2048,
        prefill_tokens: int = 16384,
        state_dtype: torch.dtype | None = None,
        graph: bool | None = None,
    ):
        sizes = {"batch_size": batch_size, "max_len": max_len, "prefill_chunk": prefill_chunk}
        for name, value in (sizes | {"prefill_tokens": prefill_tokens}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; give a number of tokens or sequences")
        if getattr(model.config, "attn_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} caps its attention scores, which the engine does not; use the model's own generate"
            )
        layer_kinds(model.config)
        self.model, self.device = model.eval(), model.device
        if graph and self.device.type != "cuda":
            raise ValueError(f"graph=True needs a model on a GPU, got one on {self.device}; leave `graph` out")
        self.batch_size, self.max_len = batch_size, max_len
        self.prefill_chunk = min(prefill_chunk, max_len)
        self.rows_at_once = max(1, prefill_tokens // self.prefill_chunk)

        def need(batch: int) -> int:
            rows = min(self.rows_at_once, batch)
            return memory.engine_bytes(model, batch, max_len, rows * self.prefill_chunk, state_dtype, n_rows=rows)

        memory.check(need, self.device, batch_size, max_len)
        self.cache = EngineCache(
            model.config, batch_size, max_len, dtype=model.dtype, device=self.device, state_dtype=state_dtype
        )
        named = inspect.signature(model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in named else "past_key_values"
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)  # the next step's input
        self.logits = torch.zeros(batch_size, model.config.vocab_size, dtype=model.dtype, device=self.device)
        self.graph = None
        self.cache.begin([0] * batch_size)
        self._warm_up(self.device.type == "cuda" if graph is None else graph)

    def _forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, vocabulary] of the last token of each row, over the engine's cache."""
        given = {"input_ids": input_ids, self.cache_name: self.cache, "use_cache": True, "logits_to_keep": 1}
        if self.cache_name == "past_key_values":
            given |= {"position_ids": positions, "engine_cache": self.cache}
        with engaged(self.model):
            return self.model(**given, attention_mask=mask).logits[:, -1]

    def _next(self) -> None:
        """One step in place: reads `tokens`, leaves `logits` and in `tokens` the likeliest of each row."""
        self.cache.advance()
        positions = (self.cache.end - 1 - self.cache.start)[:, None].clamp_min(0)
        self.logits.copy_(self._forward(self.tokens, positions))
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))

    @torch.inference_mode()
    def _warm_up(self, graph: bool) -> None:
        """Allocates the states, builds the kernels and records the graph, all on an empty cache that is emptied again."""
        self.cache.padded = True  # a graph must do for rows of any length
        with self.cache.stepping():
            if graph:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(2):
                        self._next()
                    self.cache.end.zero_()
                    torch.cuda.synchronize()
                    self.graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graph, stream=stream):
                        self._next()
                torch.cuda.current_stream().wait_stream(stream)
            else:
                self._next()
        self.cache.begin([0] * self.batch_size)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Reads prompts, at most `batch_size`, into an empty cache; logits [n, vocabulary] of what follows each.

        Shorter ones are padded on the left. The tensor is the engine's own: the next step overwrites it. Raises ValueError for
        no prompt, an empty one, or too many or too long ones.
        """
        self._check(prompts, 0)
        if len(prompts) > self.batch_size:
            raise ValueError(
                f"at most batch_size = {self.batch_size} prompts at once, got {len(prompts)}; use `generate`"
            )
        rows = [list(map(int, prompt)) for prompt in prompts]
        rows += [rows[-1]] * (self.batch_size - len(rows))  # the graph has a fixed number of rows
        longest = max(map(len, rows))
        start = [longest - len(row) for row in rows]
        ids = torch.tensor([[0] * pad + row for pad, row in zip(start, rows, strict=True)], device=self.device)
        self.cache.begin(start)
        for first in range(0, len(prompts), self.rows_at_once):
            some = slice(first, min(first + self.rows_at_once, self.batch_size))
            with self.cache.of_rows(some):
                self.logits[some] = self._read(ids[some])
        self.cache.seen(longest)
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        return self.logits[: len(prompts)]

    def _read(self, ids: Tensor) -> Tensor:
        """Logits after `ids` [rows, T], chunk by chunk."""
        cache, T = self.cache, ids.shape[1]
        column = torch.arange(T, device=self.device)
        real = column >= cache.start[cache.rows][:, None]
        positions = (column - cache.start[cache.rows][:, None]).clamp_min(0)
        cache.n_seen = 0
        for begin in range(0, T, self.prefill_chunk):
            chunk = slice(begin, begin + self.prefill_chunk)
            masked = cache.padded and self.model.config.model_type not in mamba2.MODELS  # those ask the cache
            mask = real[:, : chunk.stop] if masked else None
            logits = self._forward(ids[:, chunk], positions[:, chunk], mask)
            cache.n_seen = min(chunk.stop, T)
        return logits

    @torch.inference_mode()
    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Reads one token a row, `tokens` [batch_size] or the likeliest of the last logits; logits [batch_size, vocabulary].

        The tensor is the engine's own: the next step overwrites it. Raises ValueError if the cache is full.
        """
        if self.cache.n_seen >= self.max_len:
            raise ValueError(
                f"the cache holds max_len = {self.max_len} tokens and is full; make an engine with a larger one"
            )
        if tokens is not None:
            self.tokens.copy_(tokens.view(-1, 1))
        if self.graph is not None:
            self.graph.replay()
        else:
            with self.cache.stepping():
                self._next()
        self.cache.n_seen += 1
        return self.logits

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        eos_token_id: int | Iterable[int] = (),
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        ended: Callable[[Tensor], Sequence[bool]] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to the first of `eos_token_id`, which is kept, or `max_new_tokens`.

        An answer also stops where `ended` says so: after each step it is given the new tokens [rows, so far] of those that
        go on, and returns whether each is over (`completion.complete` ends them at stop strings). Greedy, unless `sampling`
        says how to draw; `generator` on the model's device, None for PyTorch's own. More prompts than `batch_size` are taken
        in turns. Raises ValueError for no new token, and where a prompt with its answer exceeds `max_len`.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}; use `prefill` for logits alone")
        self._check(prompts, max_new_tokens)
        eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        answers: list[list[int]] = []
        for first in range(0, len(prompts), self.batch_size):
            answers += self._generate(
                prompts[first : first + self.batch_size], max_new_tokens, eos, sampling, generator, ended
            )
        return answers

    def _generate(self, prompts, max_new_tokens, eos, sampling, generator, ended) -> list[list[int]]:
        n, warpers = len(prompts), None if sampling is None else sampling.warpers()
        logits = self.prefill(prompts)
        ends = torch.tensor(eos, dtype=torch.long, device=self.device)
        done = torch.zeros(n, dtype=torch.bool, device=self.device)
        length = torch.full((n,), max_new_tokens, device=self.device)
        new = torch.empty(n, max_new_tokens, dtype=torch.long, device=self.device)
        n_new = 0
        while n_new < max_new_tokens:
            if warpers is None:
                token = logits.argmax(-1)
            else:
                scores = warpers(None, logits.float())
                token = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            new[:, n_new] = token
            n_new += 1
            if len(eos) or ended is not None:
                over = done | torch.isin(token, ends)
                if ended is not None and not bool(over.all()):
                    rows = (~over).nonzero()[:, 0]
                    over[rows] = torch.as_tensor(ended(new[rows, :n_new]), device=self.device)
                length[over & ~done] = n_new
                done = over
                if bool(done.all()):
                    break
            if n_new < max_new_tokens:
                self.tokens[:n, 0] = token
                logits = self.step()[:n]
        return [answer[:end] for answer, end in zip(new.tolist(), length.tolist(), strict=True)]

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not prompts or min(map(len, prompts)) < 1:
            raise ValueError("every prompt needs at least one token, got none or an empty one; begin with a bos token")
        smallest, largest = min(map(min, prompts)), max(map(max, prompts))
        if smallest < 0 or largest >= self.model.config.vocab_size:
            raise ValueError(
                f"tokens must be from 0 to below the vocabulary's {self.model.config.vocab_size}, got {smallest} to {largest}; "
                "use the model's own tokeniser"
            )
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.max_len:
            raise ValueError(
                f"prompt and answer must fit into max_len = {self.max_len} tokens, got {longest} + {max_new_tokens}; "
                "shorten one of them or make an engine with a larger max_len"
            )
