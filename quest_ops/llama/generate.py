"""Generator: prompts in, tokens out: chunked prefill into a paged cache, then decode steps with Quest attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from quest_ops.attention import QuestAttention
from quest_ops.config import QuestConfig, check_int, metadata_size

from .batch import Batch, Call, Generation, split_prompts
from .model import Llama
from .sampling import Sampler
from .watch import Watch, kv_tokens_read


class Generator:
    """Generates with a model through a PagedKVCache and a QuestAttention of its own.

    attention: "quest", "dense", "sdpa" or "flashinfer" (QuestAttention's backends). quest: which pages a step keeps.
    max_batch_size: sequences at once, each in a slot of its own. max_sequence_tokens: longest prompt plus answer; None:
        the model's positions.
    cache_tokens: places in the cache, in whole blocks, for all sequences at once; None: max_batch_size times
        max_sequence_tokens. Its size is `cache.kv_bytes`.
    prefill_chunk: tokens of a prefill step, shared by the prompts admitted together.
    compile: decode steps run norms, RoPE and the like as few kernels, made by torch.compile at the first step and once
        more when another number of slots comes up (see `Llama.forward`); None: where steps are CUDA graphs.

    Prompts are admitted in order, between decode steps, as soon as a slot is free and the blocks of prompt and longest
    answer are. On a GPU the decode steps of "quest" and "dense" replay CUDA graphs, captured when a number of slots and
    kind of step first come up and kept for later calls: sequences come and go without a new capture.

    A sequence's tokens depend on no other's, up to the rounding of a matrix product with more rows.
    """

    def __init__(
        self,
        model: Llama,
        *,
        attention: str = "quest",
        quest: QuestConfig = QuestConfig(),
        max_batch_size: int = 1,
        max_sequence_tokens: int | None = None,
        cache_tokens: int | None = None,
        prefill_chunk: int = 512,
        compile: bool | None = None,
    ):
        if not isinstance(model, Llama):
            raise TypeError(f"model must be a Llama (see Llama.load), got {type(model).__name__}")
        if not isinstance(quest, QuestConfig):
            raise TypeError(f"quest must be a QuestConfig, got {type(quest).__name__}")
        if compile is not None and not isinstance(compile, bool):
            raise TypeError(f"compile must be None, True or False, got {compile!r}")
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
        num_blocks = max_batch_size * -(-max_sequence_tokens // quest.block_size)
        if cache_tokens is not None:
            num_blocks = -(-check_int("cache_tokens", cache_tokens, 1) // quest.block_size)
        self.model, self.quest, self.prefill_chunk = model, quest, prefill_chunk
        self.max_batch_size, self.max_sequence_tokens = max_batch_size, max_sequence_tokens
        self.cache = model.new_cache(quest, num_blocks, max_sequence_tokens=max_sequence_tokens)
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
        self.compile = self._use_graphs if compile is None else compile
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

        prompts: any number; those that find no slot or too few free blocks wait for others to end.
        temperature 0 is greedy; else tokens are drawn from the most likely ones that hold top_p of the probability.
        seed: prompts[i] draws with seed + i (modulo 2**64), as it would alone with that seed; None: a fresh one.
        stop_tokens: None: the model's end tokens; (): none. on_token(index of the prompt, token) sees each token as it
        comes. progress("prefill" | "decode", done, total) counts prompt tokens, and new tokens after each first.
        profile_attention: measure the time in attention (on a GPU with events, and without CUDA graphs).
        record_pages: decode steps of a sequence, counted from 0, in which the pages that Quest chooses are noted, for
        layers that use Quest in a step of its length; those that it keeps, in a step that keeps them. Both slow the
        steps down.

        Raises ValueError, before anything runs, for no prompts, an empty one, one longer than max_sequence_tokens, one
        that can never fit the cache with its longest answer, token ids outside the vocabulary, and sampling settings
        out of range; TypeError for prompts that are not lists of ints, and for stop_tokens or a seed that are no ints.
        """
        limits, blocks = self._check(prompts, max_new_tokens)
        stops = self.model.config.eos_token_ids if stop_tokens is None else stop_tokens
        if not (isinstance(stops, Collection) and all(isinstance(token, int) for token in stops)):
            raise TypeError(f"stop_tokens must be None or a collection of token ids (int), got {stops!r}")
        seed = self.sampler.start(temperature, top_p, seed)
        call = Call(
            prompts=prompts,
            limits=limits,
            stops=stops,
            on_token=on_token,
            progress=progress,
            batch=Batch(self.cache, blocks, slots=min(len(prompts), self.max_batch_size)),
            noise=[torch.Generator(self.model.device).manual_seed((seed + i) % 2**64) for i in range(len(prompts))],
            results=[Generation() for _ in prompts],
            watch=Watch(self.attention) if profile_attention or record_pages else None,
            profile_attention=profile_attention,
            record_pages=record_pages,
        )
        try:
            while True:
                while admitted := call.batch.admit():
                    self._prefill(call, admitted)
                if not call.batch.running:
                    return call.results
                self._decode(call)
        finally:
            for slot in call.batch.running:
                call.batch.release(slot)

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> tuple[list[int], list[int]]:
        """Returns the most new tokens of each prompt, and the most blocks that it can come to hold."""
        check_int("max_new_tokens", max_new_tokens, 1)
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"prompts must be a list of lists of token ids, got {type(prompts).__name__}")
        if not prompts:
            raise ValueError("prompts must be at least one list of token ids, got none")
        vocab_size, block_size = self.model.config.vocab_size, self.cache.block_size
        limits, blocks = [], []
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
            # The last token needs no place in the cache.
            limits.append(min(max_new_tokens, self.max_sequence_tokens - len(prompt) + 1))
            places = len(prompt) + limits[-1] - 1
            blocks.append(-(-places // block_size))
            if blocks[-1] > self.cache.free_blocks:
                raise ValueError(
                    f"prompts[{index}] of {len(prompt)} tokens and {limits[-1]} new ones need {blocks[-1]} blocks of "
                    f"{block_size} tokens and can never fit: the cache has {self.cache.free_blocks} free of "
                    f"{self.cache.num_blocks} (cache_tokens)"
                )
        return limits, blocks

    def _prefill(self, call: Call, slots: list[int]) -> None:
        """Reads the prompts that have just entered these slots, and takes their first tokens."""
        started, attention_before = call.clock(), call.attention_seconds()
        members = [call.batch.prompts[slot] for slot in slots]
        seqs = [call.batch.seqs[slot] for slot in slots]
        texts = [call.prompts[index] for index in members]
        self._draw(call, slots)
        device = self._tokens.device
        for chunk in split_prompts([len(text) for text in texts], self.prefill_chunk):
            tokens = torch.tensor([token for i, start, stop in chunk for token in texts[i][start:stop]])
            sizes = [stop - start for _, start, stop in chunk]
            ends = torch.tensor(sizes).cumsum(0) - 1
            finished = [row for row, (i, _, stop) in enumerate(chunk) if stop == len(texts[i])]
            self.attention.plan([seqs[i] for i, _, _ in chunk], sizes, prefill=True)
            logits = self.model(
                tokens.to(device),
                self.attention.positions[: len(tokens)],
                self.attention if call.watch is None else call.watch,
                last=ends[finished].to(device),
            )
            if finished:
                rows = [slots[chunk[row][0]] for row in finished]
                for slot, token in zip(rows, self.sampler.sample(logits, rows).tolist()):
                    call.take(slot, token)
            call.report("prefill", len(tokens))
        for index in members:
            call.results[index].prefill_seconds = call.clock() - started
            if call.profile_attention:
                call.results[index].prefill_attention_seconds = call.attention_seconds() - attention_before

    def _decode(self, call: Call) -> None:
        """Runs a step of all slots, and takes a token for each that is not empty."""
        started, attention_before = call.clock(), call.attention_seconds()
        slots, seqs = call.batch.running, call.batch.seqs
        members = [call.results[call.batch.prompts[slot]] for slot in slots]
        tokens = torch.zeros(len(seqs), dtype=torch.int64)
        tokens[slots] = torch.tensor([result.tokens[-1] for result in members])
        self.attention.plan(seqs, 1)
        self._tokens[: len(seqs)].copy_(tokens)
        self._draw(call, slots)
        if call.watch is not None:
            call.watch.records = [
                (slot, result.decode_steps, result.pages)
                for slot, result in zip(slots, members)
                if result.decode_steps in call.record_pages and self._is_sparse(seqs[slot])
            ]
            next_tokens = self._forward(len(seqs), call.watch).tolist()
        elif not self._use_graphs:
            next_tokens = self._forward(len(seqs), self.attention).tolist()
        else:
            next_tokens = self._replay(call, len(seqs)).tolist()
        seconds, attention_seconds = call.clock() - started, call.attention_seconds()
        for slot, result in zip(slots, members):
            result.decode_seconds += seconds
            result.decode_steps += 1
            if call.profile_attention:
                past = result.decode_attention_seconds or 0.0
                result.decode_attention_seconds = past + attention_seconds - attention_before
            call.count_kv(slot, *self._kv_traffic(slot, seqs[slot]))
            call.take(slot, next_tokens[slot])
        call.report("decode", len(slots))

    def _draw(self, call: Call, slots: list[int]) -> None:
        """Fresh noise for these slots, from the generators of the prompts in them."""
        for slot in slots:
            self.sampler.draw(slot, call.noise[call.batch.prompts[slot]])

    def _replay(self, call: Call, rows: int) -> Tensor:
        key = (rows, self.attention.step_kind, self.sampler.kind)
        if key not in self._graphs:
            started = time.perf_counter()
            self._graphs[key] = _DecodeGraph(lambda: self._forward(rows, self.attention))
            call.capture_seconds += time.perf_counter() - started
        return self._graphs[key].replay()

    def _forward(self, rows: int, attention) -> Tensor:
        logits = self.model(self._tokens[:rows], self.attention.positions[:rows], attention, compiled=self.compile)
        return self.sampler.sample(logits)

    def _is_sparse(self, seq: int) -> bool:
        """Whether a sequence attends to chosen pages alone in the planned decode step."""
        return self.attention.step_kind in ("quest", "reuse") and self.cache.length(seq) > self.attention.dense_length

    def _kv_traffic(self, slot: int, seq: int) -> tuple[float, float]:
        """Token places of K and V in all layers that a sequence holds, and that its planned decode step reads."""
        config, length = self.model.config, self.cache.length(seq)
        all_tokens = -(-length // self.quest.page_size) * self.quest.page_size
        quest_layers = 0
        if self._is_sparse(seq):
            quest_layers = config.num_hidden_layers - len(set(self.quest.dense_layers))
        group = config.num_attention_heads // config.num_key_value_heads
        metadata_scale = metadata_size(self.cache.metadata_dtype) / self.cache.dtype.itemsize
        if self.attention.keeps[slot]:
            metadata_scale = 0.0  # only a step that chooses pages reads it
        per_quest_layer = kv_tokens_read(length, self.quest, group=group, metadata_scale=metadata_scale)
        dense_layers = config.num_hidden_layers - quest_layers
        return config.num_hidden_layers * all_tokens, dense_layers * all_tokens + quest_layers * per_quest_layer


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
