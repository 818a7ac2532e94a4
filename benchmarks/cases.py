"""What is timed: the cases, and the pools of one case that every path and peer reads."""

import itertools
import math
import random
from dataclasses import dataclass, replace

import torch
from timing import after_reading_us, graph_us, wall_us

import quest_ops
from quest_ops.config import NARROW_METADATA, metadata_shape, metadata_size

HEAD_DIM = 128
SINK_TOKENS, RECENT_TOKENS = 16, 64  # QuestConfig's defaults


@dataclass(frozen=True)
class Pages:
    """How Quest divides the blocks of a pool: tokens a page, bits of a number of its bounds (None: those of the cache's
    dtype), and which bounds."""

    size: int = 16
    bits: int | None = None
    bound: str = "minmax"

    @property
    def sink(self) -> int:
        return math.ceil(SINK_TOKENS / self.size)

    @property
    def recent(self) -> int:
        return math.ceil(RECENT_TOKENS / self.size)


DEFAULT_PAGES = Pages(8, 4, "principal")
PAGES = {
    "pages of 16": Pages(16),
    "pages of 16, 8-bit": Pages(16, 8),
    "pages of 8, 8-bit": Pages(8, 8, "principal"),  # as many bytes as pages of 16 in 16 bits
    "pages of 8, 4-bit": DEFAULT_PAGES,
    "pages of 4, 4-bit": Pages(4, 4, "principal"),
    "pages of 16, 4-bit": Pages(16, 4, "principal"),
    "pages of 32, 4-bit": Pages(32, 4, "principal"),
}
MAIN_PAGES = tuple(PAGES.values())[:5]


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]  # tokens of each request
    kv_heads: int = 8
    query_heads: int = 32
    pages: tuple[Pages, ...] = MAIN_PAGES  # each timed over the same pools
    block_size: int = 16
    budget: int = 2048  # tokens
    dtype: torch.dtype = torch.float16
    layout: str = "HND"  # of a pool in memory: "HND" or "NHD"
    head_dim: int = HEAD_DIM  # the peers take no other

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def context(self) -> int:
        return max(self.lengths)

    @property
    def equal_lengths(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def blocks(self) -> list[int]:
        """Blocks of each request."""
        return [math.ceil(length / self.block_size) for length in self.lengths]

    def metadata_bits(self, pages: Pages) -> str:
        return str(pages.bits or 8 * self.dtype.itemsize)

    def metadata_dtype(self, pages: Pages) -> torch.dtype:
        return NARROW_METADATA[pages.bits] if pages.bits else self.dtype


def counted_bytes(case: Case, path: str, pages: Pages) -> int:
    """The bytes that `path` must move in a layer: its inputs and outputs once, not what it keeps to itself.

    Quest's are the metadata of all pages, K and V of the chosen ones, the query and the output; a request whose pages
    fit the budget needs no metadata.
    """
    element, heads, page_budget = case.dtype.itemsize, case.kv_heads, case.budget // pages.size
    vector = heads * case.head_dim * element
    bounds = int(2 * heads * case.head_dim * metadata_size(case.metadata_dtype(pages)))  # of a page
    query = case.batch * case.query_heads * case.head_dim * element
    counts = [math.ceil(length / pages.size) for length in case.lengths]
    # The last page, always chosen, holds fewer tokens than the others where the length is no multiple of a page.
    kept = sum(min(length, length - (n - page_budget) * pages.size) for length, n in zip(case.lengths, counts))
    listed = 4 * heads * sum(min(n, page_budget) for n in counts)  # page numbers
    scores = 4 * heads * sum(counts)
    if path == "append":
        in_page = sum((length - 1) % pages.size for length in case.lengths)
        return case.batch * (4 * vector + bounds) + in_page * vector
    if path in ("step", "step-cold", "apart"):
        return counted_bytes(case, "append", pages) + counted_bytes(case, "quest", pages)
    if path == "estimate":
        return sum(counts) * bounds + query + scores
    if path == "select":
        return scores + listed
    if path == "attend":
        return 2 * kept * vector + 2 * query + listed
    if path in ("separate", "quest", "quest-no-workspace", "public"):
        return sum(n for n in counts if n > page_budget) * bounds + 2 * kept * vector + 2 * query
    if path in ("dense", "dense-no-workspace", "flashinfer", "sdpa"):
        return 2 * sum(case.lengths) * vector + 2 * query
    raise ValueError(f"path must be one of kernels.py's, got {path!r}")


class Layers:
    """Several layers' pools of one case: enough of them that a step's bytes overflow L2 before a pool is read again."""

    OVERFLOW_BYTES = 150e6  # three times an H100's L2
    MOST_BYTES = 40e9  # of all layers, where it takes more than one
    LEAST = 8  # layers in a graph, so that its start is a small part of the time

    def __init__(self, case: Case, device: str = "cuda"):
        self.case, self.device = case, device
        torch.manual_seed(0)
        num_blocks = sum(case.blocks)
        inner = (case.kv_heads, case.block_size) if case.layout == "HND" else (case.block_size, case.kv_heads)
        shape = (num_blocks, 2, *inner, case.head_dim)
        self.count = self._count(math.prod(shape) * case.dtype.itemsize)
        self.pools = [torch.empty(shape, device=device, dtype=case.dtype).normal_() for _ in range(self.count)]
        self.k, self.v = zip(*map(self.keys_and_values, self.pools))
        rows = (case.batch, case.query_heads, case.head_dim)
        self.queries = [torch.randn(rows, device=device, dtype=case.dtype) for _ in self.pools]
        self.new_kv = torch.randn(2, case.batch, case.kv_heads, case.head_dim, device=device, dtype=case.dtype)
        self.table = torch.zeros(case.batch, max(case.blocks), device=device, dtype=torch.int32)
        order = torch.randperm(num_blocks, device=device, dtype=torch.int32)
        for row, blocks in zip(self.table, order.split(case.blocks)):
            row[: len(blocks)] = blocks
        self.lens = torch.tensor(case.lengths, device=device, dtype=torch.int32)
        last = self.lens.long() - 1
        last_block = self.table.gather(1, (last // case.block_size)[:, None])[:, 0]
        self.slots = last_block * case.block_size + last % case.block_size
        self.workspace = torch.zeros(quest_ops.ops.WORKSPACE_BYTES, device=device, dtype=torch.uint8)
        self._metadata = {}

    def keys_and_values(self, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The views of a pool, each `[num_blocks, S, Hkv, D]`."""
        return (pool.transpose(2, 3) if self.case.layout == "HND" else pool).unbind(1)

    def _count(self, layer_bytes: int) -> int:
        if self.device == "cpu":
            return 4  # other memory is written between passes
        fewest = min(counted_bytes(self.case, "quest", pages) for pages in self.case.pages)
        count = max(self.LEAST, math.ceil(self.OVERFLOW_BYTES / fewest))
        return max(1, min(count, int(self.MOST_BYTES // layer_bytes)))

    def metadata(self, pages: Pages) -> list[torch.Tensor]:
        """Of each layer, `[num_blocks, Hkv, M, 2, D]`, in 4 bits `[num_blocks, Hkv, M, 9 * D / 8]`."""
        if pages not in self._metadata:
            case, parts = self.case, self.case.block_size // pages.size
            dtype = case.metadata_dtype(pages)
            shape = (sum(case.blocks), case.kv_heads, parts, *metadata_shape(dtype, case.head_dim))
            made = [torch.zeros(shape, device=pool.device, dtype=dtype) for pool in self.pools]
            starts = torch.zeros_like(self.lens)
            for k, metadata in zip(self.k, made):
                quest_ops.update_page_metadata(k, metadata, self.table, self.lens, starts, bound=pages.bound)
            self._metadata[pages] = made
        return self._metadata[pages]

    def append(self, i: int, pages: Pages) -> None:
        pools = self.k[i], self.v[i], self.metadata(pages)[i]
        quest_ops.append_paged_kv(*self.new_kv, *pools, self.slots, bound=pages.bound)

    def estimate(self, i: int, pages: Pages) -> torch.Tensor:
        metadata = self.metadata(pages)[i]
        inputs = self.queries[i], metadata, self.table, self.lens, pages.size, "max"
        return quest_ops.estimate_page_scores(*inputs, bound=pages.bound)

    def select(self, scores: torch.Tensor, pages: Pages) -> tuple[torch.Tensor, torch.Tensor]:
        budget = self.case.budget // pages.size
        return quest_ops.select_topk_pages(scores, self.lens, pages.size, budget, pages.sink, pages.recent)

    def attend(self, i: int, page_ids: torch.Tensor, page_counts: torch.Tensor | None, pages: Pages) -> torch.Tensor:
        inputs = self.queries[i], self.k[i], self.v[i], self.table, self.lens, page_ids, page_counts
        return quest_ops.sparse_decode_attention(*inputs, page_size=pages.size)[0]

    def separate(self, i: int, pages: Pages) -> torch.Tensor:
        return self.attend(i, *self.select(self.estimate(i, pages), pages), pages)

    def quest(self, i: int, pages: Pages = MAIN_PAGES[0], **options) -> torch.Tensor:
        return self.quest_and_lse(i, pages, **options)[0]

    def quest_and_lse(self, i: int, pages: Pages, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return quest_ops.quest_decode_attention(self.queries[i], *self._choice(i, pages), bound=pages.bound, **options)

    def step(self, i: int, pages: Pages) -> torch.Tensor:
        return quest_ops.quest_decode_step(
            self.queries[i], *self.new_kv, *self._choice(i, pages), bound=pages.bound, workspace=self.workspace
        )[0]

    def _choice(self, i: int, pages: Pages) -> tuple:
        pools = self.k[i], self.v[i], self.metadata(pages)[i], self.table, self.lens
        return *pools, self.case.budget // pages.size, pages.sink, pages.recent, "max"

    def dense(self, i: int, **options) -> torch.Tensor:
        pools = self.k[i], self.v[i], self.table, self.lens
        return quest_ops.sparse_decode_attention(self.queries[i], *pools, **options)[0]

    def after_reading_us(self, call) -> float:
        """Microseconds of `call(i)` on a GPU where other memory is read between layers."""
        return after_reading_us([lambda i=i: call(i) for i in range(self.count)])

    def us(self, call, replays: int = 20) -> float:
        """Microseconds of `call(i)`, i a layer."""
        calls = [lambda i=i: call(i) for i in range(self.count)]
        return wall_us(calls) if self.device == "cpu" else graph_us(calls, replays)


def ragged_lengths(batch: int, shortest: int, longest: int, total: int) -> tuple[int, ...]:
    """Log-uniform lengths of the first seed whose sum is within 0.1% of `total`."""
    for seed in itertools.count():
        draw = random.Random(seed)
        lengths = tuple(round(shortest * (longest / shortest) ** draw.random()) for _ in range(batch))
        if abs(sum(lengths) - total) <= total / 1000:
            return lengths


def _gqa8(k: int, batch: int = 1) -> Case:
    return Case(f"gqa8-{k}k-b{batch}", (1024 * k,) * batch)


def _mha(k: int) -> Case:
    return Case(f"mha-{k}k-b1", (1024 * k,), kv_heads=32)


CASES = [
    *(_gqa8(k) for k in (2, 4, 8, 16)),
    _mha(32),
    _mha(128),
    *(_gqa8(k) for k in (32, 64, 128)),
    _gqa8(32, batch=8),
    Case("gqa8-b32-ragged", ragged_lengths(32, 1024, 65536, 460_000)),
]

_BASE = replace(_gqa8(32), pages=(Pages(16), DEFAULT_PAGES))
EXTRA_CASES = [
    replace(_BASE, name="gqa8-1m-b1", lengths=(2**20,)),
    replace(_BASE, name="gqa8-32k-b1-nhd", layout="NHD"),
    replace(_BASE, name="mha-32k-b1-nhd", layout="NHD", kv_heads=32),
    replace(_BASE, name="gqa8-32k-b1-bf16", dtype=torch.bfloat16),
    replace(_BASE, name="mha-32k-b1-bf16", dtype=torch.bfloat16, kv_heads=32),
    *(replace(_BASE, name=f"group{g}-32k-b1", query_heads=8 * g) for g in (1, 3, 4, 7, 8)),
    *(
        replace(_BASE, name=f"gqa8-32k-b1-page{size}", block_size=size, pages=(Pages(size), Pages(size, 8)))
        for size in (32, 64)
    ),
    *(replace(_BASE, name=f"gqa8-32k-b1-budget{budget}", budget=budget) for budget in (512, 1024, 4096, 8192)),
    # Short contexts of small budgets: what QuestConfig.for_context gives pages of 4.
    *(
        replace(
            case,
            name=f"{case.name}-budget{budget}",
            budget=budget,
            pages=(Pages(16), DEFAULT_PAGES, PAGES["pages of 4, 4-bit"]),
        )
        for case in (_gqa8(8), _mha(8))
        for budget in (512, 1024)
    ),
    # Many budgets: what QuestConfig.for_context gives coarser pages.
    *(
        replace(
            case,
            name=f"{case.name}-block32",
            block_size=32,
            pages=(PAGES["pages of 16, 4-bit"], PAGES["pages of 32, 4-bit"]),
        )
        for case in (_gqa8(128), _mha(128))
    ),
]

_SMALL = Case(
    "cpu-4k-b1-fp32", (4096,), kv_heads=2, query_heads=8, pages=(Pages(16), DEFAULT_PAGES), budget=512,
    dtype=torch.float32,
)  # fmt: skip
QUICK_CASES = [
    _SMALL,
    replace(_SMALL, name="cpu-4k-b1-bf16", dtype=torch.bfloat16),
    replace(_SMALL, name="cpu-b4-ragged-fp32", lengths=(100, 777, 1500, 3001)),
]
