"""The prompts of a call: which of them run, in which slot, which still wait, and what has become of them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quest_ops.cache import PagedKVCache

from .watch import Watch


class Batch:
    """A fixed number of slots that prompts enter in order and leave when they are done.

    blocks[i]: the most blocks that prompt i will come to hold, at most `cache.free_blocks`. They are set aside when the
    prompt is admitted, so that no running sequence ever finds the pool empty. A prompt that does not fit yet waits, and
    those behind it too: none is overtaken for ever.

    prompts, seqs: the prompt of each slot and its sequence in the cache; None for an empty slot, as
    `QuestAttention.plan` takes them.
    """

    def __init__(self, cache: PagedKVCache, blocks: list[int], slots: int):
        self.cache, self.blocks = cache, blocks
        self.prompts: list[int | None] = [None] * slots
        self.seqs: list[int | None] = [None] * slots
        self._waiting = deque(range(len(blocks)))
        self._free_blocks = cache.free_blocks

    def admit(self) -> list[int]:
        """Lets waiting prompts in, as many as fit now. Returns their slots, in the prompts' order."""
        admitted = []
        for slot, seq in enumerate(self.seqs):
            if not self._waiting or self.blocks[self._waiting[0]] > self._free_blocks:
                break
            if seq is None:
                prompt = self._waiting.popleft()
                self._free_blocks -= self.blocks[prompt]
                self.prompts[slot], self.seqs[slot] = prompt, self.cache.add()
                admitted.append(slot)
        return admitted

    def release(self, slot: int) -> None:
        """Empties a slot and gives back the blocks of its sequence."""
        self.cache.free(self.seqs[slot])
        self._free_blocks += self.blocks[self.prompts[slot]]
        self.prompts[slot] = self.seqs[slot] = None

    @property
    def running(self) -> list[int]:
        """The slots that are not empty."""
        return [slot for slot, seq in enumerate(self.seqs) if seq is not None]


@dataclass
class Generation:
    """What one prompt became.

    tokens: the new tokens, a stop token that ended them not included. finish_reason: "stop", or "length" when
        max_new_tokens or max_sequence_tokens was reached.
    first_token_seconds, seconds: from the call to this prompt's first token, and to its last: with the wait for a slot
        and the steps of others. The tokens of all prompts over the largest `seconds` are the call's throughput.
    prefill_seconds: until all prompts admitted together had their first token. decode_seconds: of the decode_steps
        that this sequence took part in. No time includes the capture of CUDA graphs and what is compiled for them.
    kv_read_share: bytes that the decode steps read of K, V and metadata, as a share of what dense attention reads
        (see `watch.kv_tokens_read`); None without decode steps.
    prefill_attention_seconds, decode_attention_seconds: the part spent in QuestAttention.run, with profile_attention.
    pages: with record_pages, {(step, layer): page ids [Hs, K] int32, ascending, padded with -1}.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    kv_read_share: float | None = None
    prefill_attention_seconds: float | None = None
    decode_attention_seconds: float | None = None
    pages: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass
class Call:
    """State of one call of `Generator.generate`: what was asked for, who is running, what has come of it."""

    prompts: list[list[int]]
    limits: list[int]  # most new tokens of each prompt
    stops: Collection[int]
    on_token: Callable[[int, int], None] | None
    progress: Callable[[str, int, int], None] | None
    batch: Batch
    noise: list[torch.Generator]  # of each prompt, so that its samples depend on nothing but its own steps
    results: list[Generation]
    watch: Watch | None
    profile_attention: bool
    record_pages: Collection[int]

    def __post_init__(self) -> None:
        self.capture_seconds = 0.0
        self._done = {"prefill": 0, "decode": 0}
        self._total = {"prefill": sum(map(len, self.prompts)), "decode": sum(self.limits) - len(self.limits)}
        self._kv_held, self._kv_read = ([0.0] * len(self.prompts) for _ in range(2))
        self._started = time.perf_counter()

    def clock(self) -> float:
        """Seconds since the call, without those spent capturing CUDA graphs."""
        return time.perf_counter() - self._started - self.capture_seconds

    def attention_seconds(self) -> float | None:
        return self.watch.seconds() if self.profile_attention else None

    def take(self, slot: int, token: int) -> None:
        """A new token of a slot; the last one of its sequence empties the slot."""
        index = self.batch.prompts[slot]
        result = self.results[index]
        result.seconds = self.clock()
        if result.decode_steps == 0:
            result.first_token_seconds = result.seconds
        if token in self.stops:
            result.finish_reason = "stop"
        else:
            result.tokens.append(token)
            if len(result.tokens) == self.limits[index]:
                result.finish_reason = "length"
            if self.on_token is not None:
                self.on_token(index, token)
        if result.finish_reason is not None:
            self.batch.release(slot)

    def count_kv(self, slot: int, held: float, read: float) -> None:
        index = self.batch.prompts[slot]
        self._kv_held[index] += held
        self._kv_read[index] += read
        self.results[index].kv_read_share = self._kv_read[index] / self._kv_held[index]

    def report(self, phase: str, tokens: int) -> None:
        self._done[phase] += tokens
        if self.progress is not None:
            self.progress(phase, self._done[phase], self._total[phase])


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
