"""Generator: prompts in, tokens out: chunked prefill into a paged cache, then decode steps with Quest attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quest_ops import ops
from quest_ops.attention import QuestAttention
from quest_ops.cache import PagedKVCache
from quest_ops.config import QuestConfig, check_int

from .model import Llama
from .sampling import Sampler


@dataclass
class Generation:
    """What one prompt became.

    tokens: the new tokens, a stop token that ended them not included. finish_reason: "stop", or "length" when
        max_new_tokens or the cache's room for the sequence was used up.
    prefill_seconds: until all prompts of the batch had their first token. decode_seconds: from there to this sequence's
        end, over decode_steps steps; capturing CUDA graphs is not counted.
    kv_read_share: bytes that the decode steps read of K, V and metadata, as a share of what dense attention reads
        (see `kv_tokens_read`); None without decode steps.
    prefill_attention_seconds, decode_attention_seconds: the part spent in QuestAttention.run, with profile_attention.
    pages: with record_pages, {(step, layer): page ids [Hs, K] int32, ascending, padded with -1}.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    kv_read_share: float | None = None
    prefill_attention_seconds: float | None = None
    decode_attention_seconds: float | None = None
    pages: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Generator:
    """Generates with a model through a PagedKVCache and a QuestAttention of its own.

    attention: "quest", "dense", "sdpa" or "flashinfer" (QuestAttention's backends). quest: which pages a step keeps.
    max_batch_size: prompts at once. max_sequence_tokens: longest prompt plus answer; None: the model's positions. The
        cache holds max_batch_size of them: its size is `cache.kv_bytes`.
    prefill_chunk: tokens of a prefill step, shared by the prompts of a batch.

    On a GPU the decode steps of "quest" and "dense" replay CUDA graphs, captured when a number of sequences and kind of
    step first come up and kept for later calls.
    """

    def __init__(
        self,
        model: Llama,
        *,
        attention: str = "quest",
        quest: QuestConfig = QuestConfig(),
        max_batch_size: int = 1,
        max_sequence_tokens: int | None = None,
        prefill_chunk: int = 512,
    ):
        if not isinstance(model, Llama):
            raise TypeError(f"model must be a Llama (see Llama.load), got {type(model).__name__}")
        if not isinstance(quest, QuestConfig):
            raise TypeError(f"quest must be a QuestConfig, got {type(quest).__name__}")
        config = model.config
        check_int("max_batch_size", max_batch_size, 1)
        check_int("prefill_chunk", prefill_chunk, 1)
        if max_sequence_tokens is None:
            max_sequence_tokens = config.max_position_embeddings
        if check_int("max_sequence_tokens", max_sequence_tokens, 1) > config.max_position_embeddings:
            raise ValueError(
                f"max_sequence_tokens {max_sequence_tokens} is more than this model's {config.max_position_embeddings} "
                "positions"
            )
        self.model, self.quest, self.prefill_chunk = model, quest, prefill_chunk
        self.max_batch_size, self.max_sequence_tokens = max_batch_size, max_sequence_tokens
        self.cache = PagedKVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            num_blocks=max_batch_size * -(-max_sequence_tokens // quest.page_size),
            page_size=quest.page_size,
            dtype=model.dtype,
            device=model.device,
            metadata_dtype=quest.metadata_dtype,
            max_sequence_tokens=max_sequence_tokens,
        )
        self.attention = QuestAttention(
            quest,
            self.cache,
            config.num_attention_heads,
            backend=attention,
            max_batch_size=max_batch_size,
            max_sequence_tokens=max_sequence_tokens,
        )
        self.sampler = Sampler(max_batch_size, config.vocab_size, model.device)
        self._tokens = torch.zeros(max_batch_size, dtype=torch.int64, device=model.device)
        self._use_graphs = model.device.type == "cuda" and attention in ("quest", "dense")
        self._graphs: dict[tuple, _DecodeGraph] = {}

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Collection[int] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        profile_attention: bool = False,
        record_pages: Collection[int] = (),
    ) -> list[Generation]:
        """Continues each prompt by up to `max_new_tokens` tokens; one Generation a prompt, in order.

        temperature 0 is greedy; else tokens are drawn from the most likely ones that hold top_p of the probability.
        stop_tokens: None: the model's end tokens; (): none. on_token(index of the prompt, token) sees each token as it
        comes. progress("prefill" | "decode", done, total) counts prompt tokens, then steps.
        profile_attention: measure the time in attention (on a GPU with events, and without CUDA graphs).
        record_pages: decode steps, counted from 0, in which the pages that Quest chooses are noted, for layers that use
        Quest in that step. Both slow the steps down.

        Raises ValueError, before anything runs, for more prompts than max_batch_size, an empty prompt, one longer than
        max_sequence_tokens, token ids outside the vocabulary, and sampling settings out of range; TypeError for prompts
        that are not lists of ints, and for stop_tokens or a seed that are no ints.
        """
        self._check(prompts, max_new_tokens)
        stops = self.model.config.eos_token_ids if stop_tokens is None else stop_tokens
        if not (isinstance(stops, Collection) and all(isinstance(token, int) for token in stops)):
            raise TypeError(f"stop_tokens must be None or a collection of token ids (int), got {stops!r}")
        self.sampler.start(temperature, top_p, seed)
        results = [Generation() for _ in prompts]
        seqs: list[int | None] = [self.cache.add() for _ in prompts]
        watch = _Watch(self, record_pages) if profile_attention or record_pages else None
        read, held = [0.0] * len(prompts), [0.0] * len(prompts)

        def take(index: int, token: int) -> None:
            result = results[index]
            room = self.max_sequence_tokens - len(prompts[index]) + 1  # the last token needs no place in the cache
            if token in stops:
                result.finish_reason = "stop"
            else:
                result.tokens.append(token)
                if len(result.tokens) == min(max_new_tokens, room):
                    result.finish_reason = "length"
                if on_token is not None:
                    on_token(index, token)
            if result.finish_reason is not None:
                self.cache.free(seqs[index])
                seqs[index] = None

        try:
            started = time.perf_counter()
            done, total = 0, sum(map(len, prompts))
            self.sampler.draw()  # for the first token of every prompt, in whichever chunk that comes
            for chunk in split_prompts([len(prompt) for prompt in prompts], self.prefill_chunk):
                for index, token in self._prefill(prompts, seqs, chunk, watch):
                    take(index, token)
                done += sum(stop - start for _, start, stop in chunk)
                if progress is not None:
                    progress("prefill", done, total)
            prefill_seconds = time.perf_counter() - started
            prefill_attention = watch.seconds() if profile_attention else None

            decode_seconds, step = 0.0, 0
            while any(seq is not None for seq in seqs):
                started = time.perf_counter()
                tokens = [result.tokens[-1] if result.tokens else 0 for result in results]
                next_tokens, capture_seconds = self._decode(seqs, tokens, watch, step)
                decode_seconds += time.perf_counter() - started - capture_seconds
                attention_seconds = watch.seconds() if profile_attention else None
                for index, token in enumerate(next_tokens):
                    if seqs[index] is None:
                        continue
                    results[index].decode_seconds, results[index].decode_steps = decode_seconds, step + 1
                    if profile_attention:
                        results[index].decode_attention_seconds = attention_seconds - prefill_attention
                    all_tokens, read_tokens = self._kv_traffic(self.cache.length(seqs[index]))
                    held[index], read[index] = held[index] + all_tokens, read[index] + read_tokens
                    take(index, token)
                step += 1
                if progress is not None:
                    progress("decode", step, max_new_tokens - 1)
        finally:
            for seq in seqs:
                if seq is not None:
                    self.cache.free(seq)

        for index, result in enumerate(results):
            result.prefill_seconds, result.prefill_attention_seconds = prefill_seconds, prefill_attention
            result.kv_read_share = read[index] / held[index] if held[index] else None
            if watch is not None:
                result.pages = {key: pages[index] for key, pages in watch.pages.items() if key[0] < result.decode_steps}
        return results

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        check_int("max_new_tokens", max_new_tokens, 1)
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a list of lists of token ids, got {type(prompts).__name__}")
        if not 1 <= len(prompts) <= self.max_batch_size:
            raise ValueError(f"prompts must be 1 to max_batch_size ({self.max_batch_size}) lists, got {len(prompts)}")
        vocab_size = self.model.config.vocab_size
        for index, prompt in enumerate(prompts):
            if not (isinstance(prompt, (list, tuple)) and all(isinstance(token, int) for token in prompt)):
                raise TypeError(f"prompts[{index}] must be a list of token ids (int), got {str(prompt)[:40]!r}")
            if not 1 <= len(prompt) <= self.max_sequence_tokens:
                raise ValueError(
                    f"prompts[{index}] has {len(prompt)} tokens; supported: 1 to {self.max_sequence_tokens} "
                    f"(max_sequence_tokens; the model has {self.model.config.max_position_embeddings} positions)"
                )
            low, high = min(prompt), max(prompt)
            if low < 0 or high >= vocab_size:
                raise ValueError(f"prompts[{index}] has token ids {low} to {high}; the vocabulary has {vocab_size}")

    def _prefill(self, prompts, seqs, chunk, watch) -> list[tuple[int, int]]:
        """Runs one chunk; returns (prompt, its first new token) of the prompts that end in it."""
        tokens = torch.tensor([token for index, start, stop in chunk for token in prompts[index][start:stop]])
        sizes = [stop - start for _, start, stop in chunk]
        ends = torch.tensor(sizes).cumsum(0) - 1
        finished = [i for i, (index, _, stop) in enumerate(chunk) if stop == len(prompts[index])]
        self.attention.plan([seqs[index] for index, _, _ in chunk], sizes, prefill=True)
        device = self._tokens.device
        logits = self.model(
            tokens.to(device),
            self.attention.positions[: len(tokens)],
            self.attention if watch is None else watch,
            last=ends[finished].to(device),
        )
        if not finished:
            return []
        indices = [chunk[i][0] for i in finished]
        return list(zip(indices, self.sampler.sample(logits, indices).tolist()))

    def _decode(self, seqs, tokens: list[int], watch, step: int) -> tuple[list[int], float]:
        """Runs a step of all sequences; returns a token a slot (junk in empty ones) and the seconds spent capturing."""
        rows = len(seqs)
        self.attention.plan(seqs, 1)
        self._tokens[:rows].copy_(torch.tensor(tokens))
        self.sampler.draw()
        if watch is not None:
            watch.step = step
            return self._forward(rows, watch).tolist(), 0.0
        if not self._use_graphs:
            return self._forward(rows, self.attention).tolist(), 0.0
        key = (rows, self.attention.step_kind, self.sampler.kind)
        capture_seconds = 0.0
        if key not in self._graphs:
            started = time.perf_counter()
            self._graphs[key] = _DecodeGraph(lambda: self._forward(rows, self.attention))
            capture_seconds = time.perf_counter() - started
        return self._graphs[key].replay().tolist(), capture_seconds

    def _forward(self, rows: int, attention) -> Tensor:
        logits = self.model(self._tokens[:rows], self.attention.positions[:rows], attention)
        return self.sampler.sample(logits)

    def _kv_traffic(self, length: int) -> tuple[float, float]:
        """Token places of K and V in all layers that one decode step at `length` tokens holds, and that it reads."""
        config = self.model.config
        all_tokens = -(-length // self.quest.page_size) * self.quest.page_size
        quest_layers = 0
        if self.attention.step_kind == "quest":
            quest_layers = config.num_hidden_layers - len(set(self.quest.dense_layers))
        group = config.num_attention_heads // config.num_key_value_heads
        metadata_scale = self.cache.metadata_dtype.itemsize / self.cache.dtype.itemsize
        per_quest_layer = kv_tokens_read(length, self.quest, group=group, metadata_scale=metadata_scale)
        dense_layers = config.num_hidden_layers - quest_layers
        return config.num_hidden_layers * all_tokens, dense_layers * all_tokens + quest_layers * per_quest_layer


def kv_tokens_read(length: int, quest: QuestConfig, *, group: int = 1, metadata_scale: float = 1.0) -> float:
    """What a Quest layer reads in a decode step at `length` tokens, in places of a token's K and V.

    With n = ceil(length / page_size) pages: all n * page_size places where n fits the page budget; else

        n * metadata_scale + heads * page_budget * page_size

    A page's metadata, two vectors, weighs as much as one token's K and V times metadata_scale: its bytes an element
    over the cache's. heads is 1, or with head_reduction "none" the group: each of its query heads reads its own pages.
    """
    pages = -(-length // quest.page_size)
    if pages <= quest.page_budget:
        return pages * quest.page_size
    heads = group if quest.head_reduction == "none" else 1
    return pages * metadata_scale + heads * quest.page_budget * quest.page_size


def split_prompts(lengths: list[int], chunk: int) -> Iterator[list[tuple[int, int, int]]]:
    """Prefill steps of `chunk` tokens (the last may have fewer): lists of (prompt, start, stop), in order."""
    step, room = [], chunk
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(start + room, length)
            step.append((index, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield step
                step, room = [], chunk
    if step:
        yield step


class _DecodeGraph:
    """A decode step as a CUDA graph. Its inputs are buffers that outlive it: tokens, noise, and what plan() fills."""

    def __init__(self, step: Callable[[], Tensor]):
        # Run before capture, so that cuBLAS and the kernels have their handles and workspaces. Repeating a step is
        # harmless: it writes the same keys and values to the same places.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.tokens = step()

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.tokens


class _Watch:
    """Stands between the model and the attention: times each run and notes the pages that Quest chooses."""

    def __init__(self, generator: Generator, record_steps: Collection[int]):
        self.attention, self.cache, self.quest = generator.attention, generator.cache, generator.quest
        self.on_gpu = generator.model.device.type == "cuda"
        self.record_steps, self.step = record_steps, None
        self.pages: dict[tuple[int, int], Tensor] = {}
        self._seconds, self._events = 0.0, []

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        start = self._now()
        out = self.attention.run(layer, query, key, value)
        stop = self._now()
        if self.on_gpu:
            self._events.append((start, stop))
        else:
            self._seconds += stop - start
        chooses = self.attention.step_kind == "quest" and layer not in self.quest.dense_layers
        if chooses and self.step in self.record_steps:
            self.pages[self.step, layer] = self._choose(layer, query)
        return out

    def seconds(self) -> float:
        """Seconds in attention so far."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(start.elapsed_time(stop) for start, stop in self._events) / 1000
            self._events = []
        return self._seconds

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _choose(self, layer: int, query: Tensor) -> Tensor:
        # The fused op does not tell its choice: its first two steps again, with this step's key in the metadata.
        quest, seq_lens = self.quest, self.attention.seq_lens[: len(query)]
        scores = ops.estimate_page_scores(
            query,
            self.cache.page_metadata(layer),
            self.attention.block_table[: len(query)],
            seq_lens,
            quest.page_size,
            quest.head_reduction,
        )
        page_ids, _ = ops.select_topk_pages(
            scores, seq_lens, quest.page_size, quest.page_budget, quest.sink_pages, quest.recent_pages
        )
        return page_ids.cpu()  # [R, Hs, K]
