"""What others offer for a decode step, on the pools of `Layers`: FlashInfer, torch's SDPA, Quest of public parts.

Each function gives microseconds a layer, or None where the peer cannot run: it then says why on stderr. What is timed
has been compared with our ops on the first layer before.
"""

import functools
import sys
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from cases import HEAD_DIM, Layers, Pages
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASHINFER_WORKSPACE_BYTES = 256 << 20
SCREENING_REPLAYS = 3  # before the best of several forms is timed in full
GPU_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@functools.cache  # once each
def note(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def check_close(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.02) -> None:
    """Raises RuntimeError unless the difference's norm is below `tolerance` of the norm of `expected`."""
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    if not error < tolerance:  # so written, it finds NaN too
        raise RuntimeError(f"{what} is wrong: relative error {error:.3g}, more than {tolerance}")


@functools.cache
def flashinfer_module():
    try:
        import flashinfer
    except ImportError as error:
        note(f"no FlashInfer in this run (pip install flashinfer-python): {error}")
        return None
    return flashinfer


def flashinfer_wrapper(tensor_cores: bool, layout: str, starts: list[int], indices: torch.Tensor, last: list[int],
                       query_heads: int, kv_heads: int, page_size: int, dtype: torch.dtype):  # fmt: skip
    """A planned BatchDecodeWithPagedKVCacheWrapper; `indices` is read at every run, not copied."""
    workspace = torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=indices.device)
    wrapper = flashinfer_module().BatchDecodeWithPagedKVCacheWrapper(
        workspace, kv_layout=layout, use_tensor_cores=tensor_cores
    )
    starts, last = torch.tensor(starts, dtype=torch.int32), torch.tensor(last, dtype=torch.int32)
    heads = query_heads, kv_heads, HEAD_DIM
    wrapper.plan(starts, indices, last, *heads, page_size, q_data_type=dtype, kv_data_type=dtype)
    return wrapper


def flashinfer_us(layers: Layers) -> float | None:
    """FlashInfer's dense paged decode, the better of its two modes."""
    if flashinfer_module() is None:
        return None
    case, times = layers.case, []
    starts = [0]
    for blocks in case.blocks:
        starts.append(starts[-1] + blocks)
    indices = torch.cat([row[:blocks] for row, blocks in zip(layers.table, case.blocks)])
    last = [(length - 1) % case.block_size + 1 for length in case.lengths]
    for tensor_cores in (False, True):
        try:
            wrapper = flashinfer_wrapper(
                tensor_cores, case.layout, starts, indices, last, case.query_heads, case.kv_heads, case.block_size,
                case.dtype,
            )  # fmt: skip
            out = wrapper.run(layers.queries[0], layers.pools[0])
        except (RuntimeError, ValueError) as error:  # a mode that does not take this shape
            note(f"{case.name}: FlashInfer with use_tensor_cores={tensor_cores}: {_first_line(error)}")
            continue
        check_close("FlashInfer's dense decode", out, layers.dense(0))
        times.append(layers.us(lambda i, run=wrapper.run: run(layers.queries[i], layers.pools[i])))
    return min(times, default=None)


def sdpa_us(layers: Layers) -> float | None:
    """torch's SDPA, the best of its backends and of two forms of a group, on a contiguous cache of the same size."""
    case = layers.case
    if not case.equal_lengths:
        note(f"{case.name}: no SDPA: it takes equal lengths only")
        return None
    shape = (2, case.batch, case.kv_heads, case.context, HEAD_DIM)
    caches = [pool.view(shape) for pool in layers.pools]
    first = _gathered(layers, 0)

    def as_queries(query, cache):  # a group's heads as queries of their KV head
        return F.scaled_dot_product_attention(query.view(*shape[1:3], -1, HEAD_DIM), *cache).view_as(query)

    def as_heads(query, cache):
        return F.scaled_dot_product_attention(query[:, :, None], *cache, enable_gqa=True)[:, :, 0]

    forms = [as_queries, as_heads] if case.query_heads > case.kv_heads else [as_heads]
    timed = []
    for backend in [None] if layers.device == "cpu" else GPU_BACKENDS:
        for form in forms:
            with sdpa_kernel(backend) if backend else nullcontext():
                try:
                    out = form(layers.queries[0], first)
                except RuntimeError as error:  # a backend that does not take this shape
                    note(f"SDPA, {backend}, {form.__name__}: {_first_line(error)}")
                    continue
                check_close(f"SDPA, {backend}, {form.__name__}", out, layers.dense(0))
                us = layers.us(lambda i, f=form: f(layers.queries[i], caches[i]), SCREENING_REPLAYS)
                timed.append((us, backend, form))
    del first
    if not timed:
        note(f"{case.name}: no SDPA: none of its backends takes this shape")
        return None
    screened, backend, form = min(timed, key=lambda entry: entry[0])
    if backend is None:
        return screened
    with sdpa_kernel(backend):
        return layers.us(lambda i: form(layers.queries[i], caches[i]))


def _gathered(layers: Layers, i: int) -> torch.Tensor:
    """A layer's keys and values in the order of the tokens, [2, B, Hkv, L, D]."""
    table = layers.table.long()
    return torch.stack([pool[i][table].flatten(1, 2).transpose(1, 2) for pool in (layers.k, layers.v)])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def page_scores(query: torch.Tensor, bounds: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """The published score, q- . lo + q+ . hi, as one batched product, its maximum over a group: [B * Hkv, P].

    query [B * Hkv, G, D], bounds [B * Hkv, P, 2 D], forced [P]: the pages that are always kept.
    """
    halves = torch.cat([query.clamp(max=0), query.clamp(min=0)], -1)
    return torch.where(forced, torch.inf, torch.bmm(halves, bounds.transpose(1, 2)).amax(1))


@functools.cache
def compiled_page_scores():
    return torch.compile(page_scores, dynamic=True)


class PublicQuest:
    """Quest from public parts: compiled scoring, torch.topk, FlashInfer's decode with each KV head as a request.

    The pool is FlashInfer's as it is: [num_blocks, 2, Hkv, S, D] seen as pages of one head, `Hkv` pages from a head's
    keys to its values. The metadata is laid out for the product beforehand, outside of the timing.
    """

    def __init__(self, layers: Layers, tensor_cores: bool, score=page_scores):
        case = self.case = layers.case
        self.layers, self.score, self.pages = layers, score, Pages(case.block_size)
        heads, self.requests = case.kv_heads, case.batch * case.kv_heads
        table = layers.table.long()
        num_pages = table.size(1)
        self.budget = min(case.budget // case.block_size, num_pages)
        self.bounds = [
            metadata[table].permute(0, 2, 1, 3, 4, 5).reshape(self.requests, num_pages, 2 * HEAD_DIM)
            for metadata in layers.metadata(self.pages)
        ]
        page = torch.arange(num_pages, device=table.device)
        self.forced = (page < self.pages.sink) | (page >= num_pages - self.pages.recent)
        first_page = torch.arange(heads, device=table.device)[:, None] + table[:, None] * (2 * heads)
        self.pool_pages = first_page.view(self.requests, num_pages).int()
        self.chosen = torch.zeros(self.requests, self.budget, device=table.device, dtype=torch.int32)
        one_head = [pool.view(-1, 1, case.block_size, HEAD_DIM) for pool in layers.pools]
        self.caches = [(pool[:-heads], pool[heads:]) for pool in one_head]
        starts = [r * self.budget for r in range(self.requests + 1)]
        last = [case.block_size] * self.requests  # every page is full
        self.attention = flashinfer_wrapper(
            tensor_cores, "HND", starts, self.chosen.view(-1), last, case.query_heads // heads, 1, case.block_size,
            case.dtype,
        )  # fmt: skip

    def select(self, i: int) -> torch.Tensor:
        """Page numbers [B * Hkv, K], in no order."""
        scores = self.score(self._query(i), self.bounds[i], self.forced)
        return scores.topk(self.budget, sorted=False).indices

    def __call__(self, i: int) -> torch.Tensor:
        torch.gather(self.pool_pages, 1, self.select(i), out=self.chosen)
        return self.attention.run(self._query(i), self.caches[i])

    def _query(self, i: int) -> torch.Tensor:
        return self.layers.queries[i].view(self.requests, -1, HEAD_DIM)

    def check(self) -> None:
        case, layers = self.case, self.layers
        selected = self.select(0).sort(-1).values.int().view(case.batch, case.kv_heads, -1)
        ours, _ = layers.select(layers.estimate(0, self.pages), self.pages)
        shared = (selected[..., None] == ours[..., None, :]).any(-1).double().mean()
        if shared < 0.9:  # half-precision scores tie at the threshold
            raise RuntimeError(f"Quest of public parts selects other pages: only {shared:.0%} in common")
        expected = layers.attend(0, selected, None, self.pages)
        check_close("Quest of public parts", self(0).view_as(expected), expected)


def public_quest_us(layers: Layers) -> float | None:
    """The better of FlashInfer's two modes in it."""
    case, times = layers.case, []
    if flashinfer_module() is None:
        note("no Quest of public parts in this run: its attention is FlashInfer's")
        return None
    full = all(length % case.block_size == 0 for length in case.lengths)
    if not (case.equal_lengths and full and case.layout == "HND"):
        note(f"{case.name}: no Quest of public parts: it takes full pages, equal lengths and HND pools only")
        return None
    for tensor_cores in (False, True):
        try:
            quest = PublicQuest(layers, tensor_cores, compiled_page_scores())
            quest(0)
        except (RuntimeError, ValueError) as error:
            note(f"{case.name}: Quest of public parts, use_tensor_cores={tensor_cores}: {_first_line(error)}")
            continue
        quest.check()
        times.append(layers.us(quest))
    return min(times, default=None)
