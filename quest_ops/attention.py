"""QuestAttention: the attention of a decoder on a PagedKVCache. Plan once a step, run once a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_ops import ops
from quest_ops.cache import PagedKVCache
from quest_ops.config import QuestConfig, check_int, metadata_size
from quest_ops.dense import causal_attention, gather_kv
from quest_ops.head_pages import HeadPages
from quest_ops.kept_pages import KeptPages
from quest_ops.planner import plan_dense_length
from quest_ops.step_tensors import BlockTable, StepRows, decode_rows, to_device

BACKENDS = ("quest", "dense", "sdpa", "flashinfer")
MAX_ROWS_PER_REQUEST = 8  # of the decode ops, as is
MAX_GROUP = 16  # query heads a KV head


class QuestAttention:
    """Attention of every layer over a paged cache: sparse or dense decode steps, dense causal prefill.

    config, cache: their page_size must agree. num_query_heads: a multiple of the cache's num_kv_heads.
    backend: how decode steps attend.
        "quest": Quest, but for `config.dense_layers` and rows of at most `dense_length` tokens (`config.dense_below`),
            which attend to all of theirs whatever the other rows of the step do.
        "dense": to the whole cache, with this library's paged kernel.
        "sdpa": to the whole cache, with torch's scaled_dot_product_attention on a gathered copy of each sequence's K
            and V: the answer to compare with. The copy is part of its time, and it cannot be captured in a CUDA graph.
        "flashinfer": to the whole cache, with FlashInfer's paged decode, on a GPU.
    max_batch_size, max_sequence_tokens: most sequences of a step and tokens of a sequence; they size the buffers.
    sm_scale: factor on q . k; None: 1 / sqrt(head_dim).

    A step is one `plan` and then `run` for each layer, on one stream. `plan` works on the host and makes one small
    asynchronous copy, two when a sequence got another block, and with `config.head_budgets` a few small kernels. In a
    decode step `block_table` [max_batch_size, max_blocks] int32 (`request_table`: its rows of this step), `seq_lens`
    and `page_budgets` [N] int32, with `config.head_budgets` also `head_page_budgets` [layers, N, Hkv or Hq] int32,
    `slot_mapping` [N] int64 and, for the caller's RoPE, `positions` [N] int64 stay at their addresses and are, beside
    the pages that rows keep, all that `run` reads of the step: a CUDA graph of it may be replayed after every `plan` of
    as many sequences and tokens and of the same `step_kind`: "dense" where no row has more than `dense_length` tokens;
    "reuse" where, with `config.select_every` above 1, no row chooses pages; else "quest". A prefill step ("prefill")
    has tensors of its own.

    With `config.select_every` above 1 run every planned step in all layers, in order: a row's later steps attend to
    what it chose there. `keeps` says of each slot of the planned step whether its row attends to pages chosen before.
    """

    def __init__(
        self,
        config: QuestConfig,
        cache: PagedKVCache,
        num_query_heads: int,
        *,
        backend: str = "quest",
        max_batch_size: int,
        max_sequence_tokens: int,
        sm_scale: float | None = None,
    ) -> None:
        if not isinstance(config, QuestConfig):
            raise TypeError(f"config must be a QuestConfig, got {type(config).__name__}")
        if not isinstance(cache, PagedKVCache):
            raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        check_int("num_query_heads", num_query_heads, 1)
        check_int("max_batch_size", max_batch_size, 1)
        check_int("max_sequence_tokens", max_sequence_tokens, 1)
        if config.page_size != cache.page_size:
            raise ValueError(f"config.page_size is {config.page_size}, the cache's is {cache.page_size}")
        if config.metadata_dtype not in (None, cache.metadata_dtype):
            raise ValueError(f"config.metadata_dtype is {config.metadata_dtype}, the cache's is {cache.metadata_dtype}")
        if num_query_heads % cache.num_kv_heads:
            raise ValueError(f"num_query_heads {num_query_heads} is no multiple of {cache.num_kv_heads} KV heads")
        if num_query_heads > MAX_GROUP * cache.num_kv_heads:
            raise ValueError(
                f"num_query_heads {num_query_heads} is more than {MAX_GROUP} for each of {cache.num_kv_heads} KV heads"
            )
        if any(layer >= cache.num_layers for layer in config.dense_layers):
            raise ValueError(f"config.dense_layers is {config.dense_layers}, the cache has {cache.num_layers} layers")
        if config.head_budgets is not None:
            shape = len(config.head_budgets), len(config.head_budgets[0])
            if shape != (cache.num_layers, cache.num_kv_heads):
                raise ValueError(
                    f"config.head_budgets has {shape[0]} layers of {shape[1]} KV heads, the cache has "
                    f"{cache.num_layers} of {cache.num_kv_heads}"
                )
        if sm_scale is not None and not (isinstance(sm_scale, (int, float)) and 0 < sm_scale <= ops.FLOAT32_MAX):
            raise ValueError(f"sm_scale must be None or a positive float32 number, got {sm_scale!r}")
        max_blocks = -(-max_sequence_tokens // cache.block_size)
        if max_blocks * cache.block_size >= 2**31:
            raise ValueError(
                f"max_sequence_tokens must fit int32 in blocks of {cache.block_size}, got {max_sequence_tokens}"
            )
        self.config = config
        self.cache = cache
        self.backend = backend
        self.num_query_heads = num_query_heads
        self.max_batch_size = max_batch_size
        self.max_sequence_tokens = max_sequence_tokens
        self.sm_scale = cache.head_dim**-0.5 if sm_scale is None else float(sm_scale)
        self.dense_length = config.dense_below
        if self.dense_length is None:
            self.dense_length = _planned_dense_length(config, cache, max_batch_size)
        # Pages of the longest row that is attended in full, and of the largest budget if those are more.
        table_pages = max_blocks * (cache.block_size // cache.page_size)
        covering = min(-(-self.dense_length // cache.page_size), table_pages)
        largest = config.row_page_budget(max_sequence_tokens)
        self._max_rows = max_batch_size * MAX_ROWS_PER_REQUEST
        self._head_pages = None
        if config.head_budgets is not None and backend == "quest":
            group = num_query_heads // cache.num_kv_heads if config.head_reduction == "none" else 1
            self._head_pages = HeadPages(config, group, self._max_rows, cache.device)
            largest = self._head_pages.most(largest)
        self._most_pages = max(config.page_budget, min(largest, table_pages), covering)
        self._all_pages = max(table_pages, config.sink_pages + config.recent_pages + 1)
        self._dense_layers = frozenset(config.dense_layers)
        self._workspace = None  # where the blocks of a one-launch step meet; steps run on one stream, so one serves all
        if backend in ("quest", "dense") and cache.device.type == "cuda":
            self._workspace = torch.zeros(ops.WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        self._flashinfer = None
        if backend == "flashinfer":
            from quest_ops.integrations.flashinfer_backend import FlashInferDecode

            self._flashinfer = FlashInferDecode(cache, num_query_heads, max_sequence_tokens, self.sm_scale)

        self._table = BlockTable(cache, max_batch_size, max_blocks)
        self.block_table = self._table.tensor
        self._rows = StepRows(self._max_rows, cache.device)
        self.step_kind: str | None = None
        self._describe([], [], [], [])
        self.head_page_budgets: Tensor | None = None
        self.kept: KeptPages | None = None
        if backend == "quest" and config.select_every > 1:
            self.kept = KeptPages(
                config,
                cache,
                num_query_heads,
                page_budget=self._most_pages,
                dense_length=self.dense_length,
                max_batch_size=max_batch_size,
            )
        self.keeps: list[bool] = []
        self.uses_kept = False

    def plan(self, seqs: list[int | None], new_tokens: int | list[int], *, prefill: bool = False) -> None:
        """Reserves the tokens of a step in the cache and describes the step to the device.

        seqs: ids of `cache`, None for an empty slot. new_tokens: how many tokens the step appends to each, 1 or more
        (what a list says about an empty slot is ignored). With the same number T <= 8 for all, this is a decode step:
        its rows are T for every slot, empty ones included. Else, or with prefill=True, it is a prefill step: its rows
        are the new tokens of the sequences, one sequence after the other.

        Raises ValueError, TypeError or OutOfPagesError; then no sequence has been extended.
        """
        counts = self._check_step(seqs, new_tokens)
        live = [b for b, seq in enumerate(seqs) if seq is not None]
        sizes = {counts[b] for b in live} or {new_tokens if isinstance(new_tokens, int) else 1}
        rows_per_request = max(sizes)
        decode = not prefill and len(sizes) == 1 and rows_per_request <= MAX_ROWS_PER_REQUEST
        if not decode and not live:
            raise ValueError("seqs has no sequence: a prefill step needs one")
        self.cache.extend_all([seqs[b] for b in live], [counts[b] for b in live])

        lengths = [0 if seq is None else self.cache.length(seq) for seq in seqs]
        self._table.update(seqs)
        self.uses_kept, self.keeps = False, [False] * len(seqs)
        if decode:
            sparse = self.backend == "quest" and max(lengths) > self.dense_length
            self.step_kind = "quest" if sparse else "dense"
            if sparse and self.kept is not None and rows_per_request == 1:
                self.uses_kept, self.keeps = True, self.kept.plan(seqs)
                self.step_kind = "reuse" if all(self.keeps) else "quest"
            self._plan_decode(seqs, rows_per_request)
        else:
            self._plan_prefill(seqs, live, counts)
            self.step_kind = "prefill"

        self._spans = []  # of the rows of each sequence, for torch's attention
        if self.backend == "sdpa" or not decode:
            first = 0
            for b in live:
                first = b * rows_per_request if decode else first
                self._spans.append((slice(first, first + counts[b]), lengths[b], self._table.blocks(b)))
                first += counts[b]
        elif self._flashinfer is not None:
            self._flashinfer.plan(self.block_table, lengths, rows_per_request)

        cache = self.cache
        rows = self.positions.numel()
        self.request_table = self.block_table[: len(seqs)]
        self._query_shape = (rows, self.num_query_heads, cache.head_dim)
        self._key_shape = (rows, cache.num_kv_heads, cache.head_dim)

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Appends the step's K and V to the cache of a layer, and attends.

        query [N, Hq, D], key and value [N, Hkv, D], after RoPE, in the cache's dtype and on its device; N and the order
        of the rows as planned. Returns [N, Hq, D]. The keys and values of an empty slot are ignored, its output is
        zero. Call it before the planned sequences are rolled back, forked or freed: the step's slots are theirs.

        Raises RuntimeError before the first plan, TypeError, ValueError or RuntimeError for other inputs than these;
        then nothing has been written.
        """
        self._check_inputs(layer, query, key, value)
        dense = self.step_kind == "dense" or layer in self._dense_layers
        if self.step_kind == "prefill" or self.backend in ("sdpa", "flashinfer"):
            self.append(layer, key, value)
            if self._flashinfer is not None and self.step_kind != "prefill":
                return self._flashinfer.run(layer, query)
            return self._run_sdpa(layer, query)
        cache, config = self.cache, self.config
        if self.uses_kept and not dense:
            self.append(layer, key, value)
            out, _ = ops.sparse_decode_attention(
                query,
                cache.k_cache(layer),
                cache.v_cache(layer),
                self.request_table,
                self.seq_lens,
                *self.kept_pages(layer, query),
                page_size=config.page_size,
                sm_scale=self.sm_scale,
            )
            return out
        page_budget, page_budgets = (self._all_pages, None) if dense else self.budgets_of(layer)
        out, _ = ops.quest_decode_step(
            query,
            key,
            value,
            cache.k_cache(layer),
            cache.v_cache(layer),
            cache.page_metadata(layer),
            self.request_table,
            self.seq_lens,
            page_budget,
            config.sink_pages,
            config.recent_pages,
            config.head_reduction,
            bound=config.bound,
            bound_scale=config.bound_scale,
            sm_scale=self.sm_scale,
            page_budgets=page_budgets,
            workspace=self._workspace,
        )
        return out

    def append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes the planned step's key and value [N, Hkv, D] to the cache of a layer. `run` does so by itself."""
        cache, config = self.cache, self.config
        ops.append_paged_kv(
            key,
            value,
            cache.k_cache(layer),
            cache.v_cache(layer),
            cache.page_metadata(layer),
            self.slot_mapping,
            bound=config.bound,
            bound_scale=config.bound_scale,
        )

    def budgets_of(self, layer: int) -> tuple[int, Tensor | None]:
        """page_budget and page_budgets of the planned decode step in a layer, as the ops take them."""
        if self.head_page_budgets is not None:
            return self._most_pages, self.head_page_budgets[layer]
        return self._most_pages, self.page_budgets if self._most_pages > self.config.page_budget else None

    def kept_pages(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """page_ids [N, Hs, K] and page_counts [N, Hs] of a layer in a planned step that `uses_kept`; rows that do not
        keep theirs choose them with query [N, Hq, D] and the metadata as it is. The next such step writes over them."""
        if self.step_kind == "quest":
            # Of no tokens where a row keeps its pages: then its metadata is not read.
            self.kept.replace(layer, self.choose_pages(layer, query, self._choosing_lens), self._row_keeps)
        return self.kept.lists(layer, len(query))

    def choose_pages(self, layer: int, query: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """page_ids [N, Hs, K], padded with -1, and page_counts [N, Hs], int32: what Quest chooses in a layer of the
        planned decode step for query [N, Hq, D], by the metadata as it is, of the first seq_lens [N] int32 tokens."""
        config = self.config
        scores = ops.estimate_page_scores(
            query,
            self.cache.page_metadata(layer),
            self.request_table,
            seq_lens,
            config.page_size,
            config.head_reduction,
            bound=config.bound,
        )
        page_budget, page_budgets = self.budgets_of(layer)
        return ops.select_topk_pages(
            scores,
            seq_lens,
            config.page_size,
            page_budget,
            config.sink_pages,
            config.recent_pages,
            page_budgets=page_budgets,
        )

    def _check_step(self, seqs: list[int | None], new_tokens: int | list[int]) -> list[int]:
        if not isinstance(seqs, (list, tuple)):
            raise TypeError(f"seqs must be a list of sequence ids and None, got {type(seqs).__name__}")
        if not 1 <= len(seqs) <= self.max_batch_size:
            raise ValueError(f"seqs must have 1 to max_batch_size = {self.max_batch_size} entries, got {len(seqs)}")
        counts = list(new_tokens) if isinstance(new_tokens, (list, tuple)) else [new_tokens] * len(seqs)
        if len(counts) != len(seqs):
            raise ValueError(f"new_tokens has {len(counts)} entries for {len(seqs)} seqs")
        for seq, count in zip(seqs, counts, strict=True):
            if seq is None and isinstance(new_tokens, (list, tuple)):
                continue
            check_int("new_tokens", count, 1)
            length = 0 if seq is None else self.cache.length(seq) + count
            if length > self.max_sequence_tokens:
                raise ValueError(
                    f"sequence {seq} would hold {length} tokens, max_sequence_tokens is {self.max_sequence_tokens}"
                )
        return counts

    def _check_inputs(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if self.step_kind is None:
            raise RuntimeError("run was called before plan: there is no step to run")
        if check_int("layer", layer, 0) >= self.cache.num_layers:
            raise ValueError(f"layer must be 0 to {self.cache.num_layers - 1}, got {layer}")
        dtype, device = self.cache.dtype, self.cache.device
        shapes = (self._query_shape, self._key_shape, self._key_shape)
        for name, x, shape in zip(("query", "key", "value"), (query, key, value), shapes, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.shape != shape:
                raise ValueError(f"{name} must be {list(shape)} as planned, got {list(x.shape)}")
            if x.dtype != dtype or x.device != device:
                raise ValueError(f"{name} must be {dtype} on {device} as the cache, got {x.dtype} on {x.device}")
        # The ops say so too: of key and value before they write them, of query when they have.
        places = [stride for size, stride in zip(query.shape, query.stride()[:2], strict=False) if size > 1]
        if query.stride(2) != 1 or any(x * dtype.itemsize % 16 for x in (*places, query.storage_offset())):
            raise ValueError(
                "query must be contiguous in its last dimension and have rows aligned to 16 bytes, "
                f"got strides {list(query.stride())} at offset {query.storage_offset()}"
            )

    def _plan_decode(self, seqs: list[int | None], rows_per_request: int) -> None:
        slots, positions, lengths = decode_rows(self.cache, seqs, rows_per_request)
        budgets = [self._most_pages if n <= self.dense_length else self.config.row_page_budget(n) for n in lengths]
        kept = ()
        if self.uses_kept:
            kept = [0 if keeps else n for keeps, n in zip(self.keeps, lengths, strict=True)], self.keeps
        self._describe(slots, positions, lengths, budgets, *kept)
        if self._head_pages is not None:
            full = self.seq_lens.long() <= self.dense_length
            self.head_page_budgets = self._head_pages.update(self.page_budgets, full)

    def _describe(self, *numbers: list[int]) -> None:
        self.slot_mapping, self.positions, self.seq_lens, self.page_budgets, *kept = self._rows.fill(*numbers)
        self._choosing_lens, self._row_keeps = kept

    def _plan_prefill(self, seqs: list[int | None], live: list[int], counts: list[int]) -> None:
        slots, positions = [], []
        for b in live:
            end = self.cache.length(seqs[b])
            slots.append(self.cache.slots(seqs[b], end - counts[b], end))
            positions.append(torch.arange(end - counts[b], end))
        described = torch.stack([torch.cat(slots), torch.cat(positions)])
        self.slot_mapping, self.positions = to_device(described, self.cache.device)
        self.seq_lens = (self.positions + 1).int()

    def _run_sdpa(self, layer: int, query: Tensor) -> Tensor:
        out = torch.zeros(self._query_shape, dtype=query.dtype, device=query.device)
        for rows, length, blocks in self._spans:
            keys, values = gather_kv(self.cache.pool[layer], blocks, length)
            out[rows] = causal_attention(query[rows], keys, values, self.sm_scale)
        return out


def _planned_dense_length(config: QuestConfig, cache: PagedKVCache, max_batch_size: int) -> int:
    """`plan_dense_length` on GPUs of the kind it was measured on; elsewhere what fills the budget's pages."""
    if cache.device.type != "cuda" or torch.cuda.get_device_capability(cache.device) < (9, 0):
        return config.page_budget * config.page_size
    return plan_dense_length(
        rows=max_batch_size,
        kv_heads=cache.num_kv_heads,
        head_dim=cache.head_dim,
        element_size=cache.dtype.itemsize,
        metadata_size=metadata_size(cache.metadata_dtype),
        page_size=config.page_size,
        page_budget=config.page_budget,
        num_sms=torch.cuda.get_device_properties(cache.device).multi_processor_count,
        budget_ratio=config.budget_ratio or 0.0,
    )
