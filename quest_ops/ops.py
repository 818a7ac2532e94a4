"""The ops, one function each. All take the same tensors, so they compose with any engine's paged cache:

- `query [R, Hq, D]` float16 / bfloat16 (float32 on the CPU too), `R = B * T`: `T` of 1 to 8 adjacent rows share a
  request's block table; `Hq / Hkv` of 1 to 16, `D` of 64, 128 or 256.
- `k_cache`, `v_cache [num_blocks, S, Hkv, D]` of query's dtype: any strides, last dimension contiguous, rows aligned to
  16 bytes. NHD, HND, FlashInfer's and vLLM's pools are views of this shape. `S = M * page_size` tokens, `page_size` of
  4, 8, 16, 32, 64 or 128, `M` of 1 to 8.
- `page_metadata [num_blocks, Hkv, M, 2, D]`, or `[num_blocks, Hkv, 2, D]` where a block is one page: per page and KV
  head two vectors, `[..., 0, :]` lo and `[..., 1, :]` hi, in the cache's dtype or in float8_e4m3fn, which saturates at
  +-448; or, in 4 bits, uint8 `[num_blocks, Hkv, M, 9 * D / 8]` (below). What they are is the `bound` of the two ops
  that write them, channel by channel over the page's keys:
  - "minmax": minimum and maximum (QUEST: Tang et al., ICML 2024, figure 5). In 8 bits the minimum is rounded down and
    the maximum up, so that they still bound keys of magnitude up to 448.
  - "cuboid": mean -+ `bound_scale` * mean absolute deviation. "mean_std": mean -+ `bound_scale` * standard deviation
    (of the page's tokens, divided by their number). No bounds but an estimate: of the keys that matter, a closer one.
    In float32, tokens in their order, one rounding an operation (none fused), then rounded to nearest even:
    `mean = sum(k) / n`, `radius = bound_scale * (sum(|k - mean|) / n)` or `bound_scale * sqrt(sum((k - mean)^2) / n)`.
  - "principal": the two points `mean - bound_scale * below * u` and `mean + bound_scale * above * u`. `u` is the page's
    principal axis, the unit vector along `sum_t ((k_t - mean) . (k_f - mean)) * (k_t - mean)`: one step of the power
    method from `k_f`, the (first) key farthest from the mean. With `p_t = (k_t - mean) . u`, `above` is the fourth root
    of `sum(p_t^4 where p_t > 0) / n`, `below` that of the others: between standard deviation and largest one. No bound
    either, and closer than a mean and a radius: it knows which channels deviate together, and to which side. In float32
    as above; a product over channels is summed by neighbours, then neighbours of these. With `d_t = k_t - mean` and
    `s = d_f . d_f`: `a = sum((d_t . d_f * (1 / s)) * d_t)`, `u = a * (1 / sqrt(a . a))`,
    `q_t = d_t . u * (1 / sqrt(s))`, `above = sqrt(s) * sqrt(sqrt(sum(q_t^4 where q_t > 0) / n))`; where `s < 2^-126`,
    the mean twice.
  In 4 bits a page's 9 * D / 8 bytes are codes of lo and of hi, D / 2 bytes each, and their scales, D / 32 float16 each.
  A scale `s` serves 32 adjacent channels: of their largest magnitude `m`, `m / 7` rounded to nearest even, or the next
  float16 above where `7 * s < m`; at most 65504, so numbers saturate at +-458528. A number is `c * s`, `c` of -7 to 7
  nearest to `x / s`, ties to even; of "minmax" rounded down for lo and up for hi, so that they still bound keys of
  magnitude up to 458528. A NaN makes the scale of its 32 channels NaN. csrc/params.h has the order of the codes.
  The ops that read metadata take the same `bound`: the score of a page is `sum_d max(q_d * lo_d, q_d * hi_d)`, which
  for a mean and a radius is `q . mean + |q| . radius`; of two points it is `max(q . lo, q . hi)`.
- `block_table [B, max_blocks]` int32; entries past a row's length may hold anything. `seq_lens [R]` int32: how many
  tokens a row sees, itself included; clamped to the table; 0 is an empty slot.

Lengths and tables are read on the device alone, so every op can be captured in a CUDA graph and replayed while lengths
grow. On the CPU the ops also check the block numbers and slots that they use; on a GPU that takes `QUEST_OPS_CHECK=1`
in the environment, which on both makes these functions check page numbers too: slow, and it synchronises a GPU.

Errors: each function raises RuntimeError, before anything is written, for a shape, dtype, device, stride or number that
it does not support. The message names the argument, what was received and what is supported.
"""

import os

import torch
from torch import Tensor

from quest_ops.config import PAGE_SIZES

_ops = torch.ops.quest_ops

FLOAT32_MAX = torch.finfo(torch.float32).max

WORKSPACE_BYTES = 32 << 20  # of `quest_decode_attention`'s workspace: enough for any call


def append_paged_kv(
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_metadata: Tensor,
    slot_mapping: Tensor,
    *,
    bound: str = "minmax",
    bound_scale: float = 1.0,
) -> None:
    """Write new keys and values into the cache and bring the metadata of their pages up to date, in one launch.

    Args:
        key, value: `[X, Hkv, D]`, the cache's dtype; may be slices of one fused projection.
        k_cache, v_cache, page_metadata: written in place.
        slot_mapping: `[N]` int64, `N <= X`: row `i` goes to token `slot % S` of block `slot // S`; a negative slot is
            skipped, rows past `N` are padding. Once skips are dropped, tokens of one page must be adjacent.
        bound: "minmax", "cuboid", "mean_std" or "principal", what the metadata is (above); one choice for all calls on
            a cache.
        bound_scale: factor on the deviation, a positive float32 number; 1 for "minmax".

    A touched page's metadata is computed from the stored keys at offsets 0 to the highest one written, never from
    earlier metadata: rejected drafts, copied partial pages and reused blocks end in the same bits as a fresh build. A
    NaN key makes its channel's bounds NaN, in 4 bits those of the 32 channels of its scale; so does an infinite one
    where they are made of a mean; "principal" has then NaN in every channel.

    Raises:
        RuntimeError: as above, and for a slot past the cache (on a GPU: with `QUEST_OPS_CHECK=1`).
    """
    if _checking() and _has_values(slot_mapping, (1,), torch.int64) and _has_values(k_cache, (4,)):
        slots = k_cache.size(0) * k_cache.size(1)
        _check_values("slot_mapping", slot_mapping, slot_mapping < slots, f"slots below {slots}")
    _ops.append_paged_kv(
        key, value, k_cache, v_cache, page_metadata, slot_mapping, bound=bound, bound_scale=bound_scale
    )


def update_page_metadata(
    k_cache: Tensor,
    page_metadata: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    start_lens: Tensor,
    *,
    bound: str = "minmax",
    bound_scale: float = 1.0,
) -> None:
    """Compute the metadata of every page that holds a token of `[start_lens[b], seq_lens[b])` from its stored keys.

    For keys that other code wrote, loaded prefixes, a changed cache. Same bits as `append_paged_kv`.

    Args:
        k_cache: read only. page_metadata: written in place.
        seq_lens, start_lens: `[B]` int32, in tokens; one for each request, not for each row.
        bound, bound_scale: as in `append_paged_kv`.

    Raises:
        RuntimeError: as above, and for a block number past the cache (on a GPU: with `QUEST_OPS_CHECK=1`).
    """
    if _checking() and _has_values(k_cache, (4,)):
        _check_block_table(block_table, seq_lens, k_cache.size(1), k_cache.size(0))
    _ops.update_page_metadata(
        k_cache, page_metadata, block_table, seq_lens, start_lens, bound=bound, bound_scale=bound_scale
    )


def estimate_page_scores(
    query: Tensor,
    page_metadata: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    head_reduction: str,
    *,
    bound: str = "minmax",
) -> Tensor:
    """The score of each page, `sum_d max(q_d * lo_d, q_d * hi_d)` (QUEST, figure 5, stage 1); "principal":
    `max(q . lo, q . hi)`.

    With metadata of bound "minmax" that is an upper bound of `q . k` over the page's keys.

    Args:
        page_size: tokens a page: 4, 8, 16, 32, 64 or 128.
        head_reduction: over the query heads of a KV head: "max", "mean", or "none" for a score for each query head.
        bound: that of the metadata.

    Returns:
        scores `[R, Hs, P]` float32, `Hs` = `Hkv` ("none": `Hq`), `P` = max_blocks * M; `-inf` past a row's last page.
        Not scaled by `sm_scale`. NaN in metadata gives NaN, which selection ranks first.

    Raises:
        RuntimeError: as above, and for a block number past the cache (on a GPU: with `QUEST_OPS_CHECK=1`).
    """
    if _checking() and _has_values(page_metadata, (4, 5)) and page_size in PAGE_SIZES:
        parts = _parts(page_metadata)
        _check_block_table(block_table, seq_lens, page_size * parts, page_metadata.size(0))
    return _ops.estimate_page_scores(
        query, page_metadata, block_table, seq_lens, page_size, head_reduction, bound=bound
    )


def select_topk_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    page_budget: int,
    sink_pages: int,
    recent_pages: int,
    *,
    page_budgets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `page_budget` best pages of each row and head, exactly: ties go to the earlier page, NaN ranks first.

    Args:
        scores: `[R, Hs, P]` float32, contiguous; read only up to a row's last page.
        seq_lens: `[R]` int32, in tokens.
        page_size: tokens a page: 4, 8, 16, 32, 64 or 128.
        page_budget: `K` pages, at least `sink_pages + recent_pages + 1`.
        sink_pages, recent_pages: the first and last pages, always kept; at least 1 recent page, the one being written.
        page_budgets: int32 `[R]` or `[R, Hs]`, budgets in pages of single rows or heads, clamped to
            `[sink_pages + recent_pages, page_budget]`.

    Returns:
        page_ids `[R, Hs, K]` int32, page numbers within the sequence, ascending, padded with -1; page_counts `[R, Hs]`
        int32. All pages where they fit the budget.

    Raises:
        RuntimeError: as above.
    """
    return _ops.select_topk_pages(
        scores, seq_lens, page_size, page_budget, sink_pages, recent_pages, page_budgets=page_budgets
    )


def sparse_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_ids: Tensor | None = None,
    page_counts: Tensor | None = None,
    *,
    page_size: int | None = None,
    sm_scale: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each row over the tokens of its listed pages; over all its tokens without `page_ids`.

    `out = sum_t softmax_t(sm_scale * q . k_t) * v_t` (Vaswani et al. 2017, equation 1).

    Args:
        page_ids: `[R, Hi, K]` int32, ascending, as `select_topk_pages` gives them; `Hi` is 1, `Hkv` or `Hq`. A row's
            last page is attended whether listed or not, so a selection may be reused over steps.
        page_counts: `[R, Hi]` int32; None: up to the first -1.
        page_size: tokens a page; None: the block size `S`.
        sm_scale: finite factor of `q . k`; None: `1 / sqrt(D)`.
        workspace: as `quest_decode_attention`'s; with it dense attention is one launch on such a GPU
            where two blocks for each row and KV head fit the chip.
        out, lse: written instead of fresh tensors; they must not share memory with each other or with an input.

    Returns:
        out `[R, Hq, D]` of query's dtype, lse `[R, Hq]` float32: natural log of the sum of `exp(sm_scale * q . k)`, as
        FlashAttention and vLLM (FlashInfer's is base 2). An empty slot gives zeros and `-inf`.

    Raises:
        RuntimeError: as above, for a block number past the cache (on a GPU: with `QUEST_OPS_CHECK=1`), and with
            `QUEST_OPS_CHECK=1` for page ids out of range or not ascending.
    """
    if _checking() and _has_values(k_cache, (4,)):
        _check_block_table(block_table, seq_lens, k_cache.size(1), k_cache.size(0))
        size = k_cache.size(1) if page_size is None else page_size
        if _has_values(block_table, (2,)) and size in PAGE_SIZES:
            _check_page_ids(page_ids, page_counts, seq_lens, size, block_table.size(1) * k_cache.size(1))
    return _attend(
        _ops.sparse_decode_attention,
        _ops.sparse_decode_attention_out,
        (query, k_cache, v_cache, block_table, seq_lens, page_ids, page_counts),
        out,
        lse,
        page_size=page_size,
        sm_scale=sm_scale,
        workspace=workspace,
    )


def quest_decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_metadata: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_budget: int,
    sink_pages: int,
    recent_pages: int,
    head_reduction: str,
    *,
    bound: str = "minmax",
    sm_scale: float | None = None,
    page_budgets: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """QUEST's decode step in one call: `estimate_page_scores`, `select_topk_pages`, `sparse_decode_attention`.

    Equal to the composition of the three; arguments, results and errors are theirs. A page is `S / M` tokens, from the
    shapes of the cache and its metadata. Rows whose pages fit the budget are attended in full.

    On a GPU of compute capability 9.0 and later the whole step is one launch, for up to 8 query heads a KV head and
    131,072 pages a row (fewer where rows times KV heads are hundreds: what the workspace holds). Its blocks exchange
    scores through `workspace`: uint8 `[bytes]`, zeros at first use, `WORKSPACE_BYTES` (32 MiB) for any call, left as
    zeros; calls that may run at the same time need one each. None: fresh scratch, cleared by a launch of its own (3 to
    6 us, more with many pages or rows).

    That launch reads page_metadata while the kernel before it may still run, if that lets dependents start early
    (programmatic dependent launch): other code that writes metadata by such a kernel must not do so before it has
    written. All else is read after it has ended.
    """
    if _checking() and _has_values(k_cache, (4,)):
        _check_block_table(block_table, seq_lens, k_cache.size(1), k_cache.size(0))
    arguments = (
        query,
        k_cache,
        v_cache,
        page_metadata,
        block_table,
        seq_lens,
        page_budget,
        sink_pages,
        recent_pages,
        head_reduction,
    )
    return _attend(
        _ops.quest_decode_attention,
        _ops.quest_decode_attention_out,
        arguments,
        out,
        lse,
        bound=bound,
        sm_scale=sm_scale,
        page_budgets=page_budgets,
        workspace=workspace,
    )


def quest_decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_metadata: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    page_budget: int,
    sink_pages: int,
    recent_pages: int,
    head_reduction: str,
    *,
    bound: str = "minmax",
    bound_scale: float = 1.0,
    sm_scale: float | None = None,
    page_budgets: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A decoder's step in one call: `append_paged_kv` of each row's last token, then `quest_decode_attention`.

    Args:
        key, value: `[R, Hkv, D]` of query's dtype: of token `seq_lens[r] - 1` of row `r`, which goes to its place by
            the block table and is seen by the row (and by later rows of its request). Of an empty slot: not used.
        k_cache, v_cache, page_metadata: written in place.
        bound, bound_scale: as in `append_paged_kv`, for what it writes and for what it reads.

    The others, results and errors are those of the two ops, and so are all bits that it writes, with one condition: no
    other request's row may see a page that this call appends to (full pages may be shared).

    Where `quest_decode_attention` is one launch, so is this, for one row a request: it takes about as long as
    attention alone.
    """
    if _checking() and _has_values(k_cache, (4,)):
        _check_block_table(block_table, seq_lens, k_cache.size(1), k_cache.size(0))
    arguments = (
        query,
        key,
        value,
        k_cache,
        v_cache,
        page_metadata,
        block_table,
        seq_lens,
        page_budget,
        sink_pages,
        recent_pages,
        head_reduction,
    )
    return _attend(
        _ops.quest_decode_step,
        _ops.quest_decode_step_out,
        arguments,
        out,
        lse,
        bound=bound,
        bound_scale=bound_scale,
        sm_scale=sm_scale,
        page_budgets=page_budgets,
        workspace=workspace,
    )


def _attend(op, op_out, arguments: tuple, out: Tensor | None, lse: Tensor | None, **options) -> tuple[Tensor, Tensor]:
    """An attention op of `arguments`, query first, with fresh outputs or, where one is given, into both."""
    if out is None and lse is None:
        return op(*arguments, **options)
    query = arguments[0]
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if lse is None:
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    op_out(*arguments, **options, out=out, lse=lse)
    return out, lse


def _checking() -> bool:
    return os.environ.get("QUEST_OPS_CHECK") == "1" and not torch.compiler.is_compiling()


def _parts(page_metadata: Tensor) -> int:
    """Pages a block."""
    has_parts = page_metadata.dim() == 5 or page_metadata.dtype == torch.uint8
    return page_metadata.size(2) if has_parts else 1


def _has_values(tensor: Tensor, ranks: tuple[int, ...], dtype: torch.dtype | None = None) -> bool:
    """Whether values can be looked at; where not, the op itself says what is wrong with the argument."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dim() in ranks
        and dtype in (None, tensor.dtype)
        and tensor.device.type in ("cpu", "cuda")
    )


def _check_values(name: str, values: Tensor, good: Tensor, supported: str) -> None:
    if not bool(good.all()):
        at = (~good).nonzero()[0].tolist()
        raise RuntimeError(f"quest_ops: {name}{at} is {int(values[tuple(at)])}; supported: {supported}")


def _check_block_table(block_table: Tensor, seq_lens: Tensor, block_size: int, num_blocks: int) -> None:
    if not (_has_values(block_table, (2,), torch.int32) and _has_values(seq_lens, (1,), torch.int32)):
        return
    requests = block_table.size(0)
    if block_table.device != seq_lens.device or not requests or not seq_lens.numel() or seq_lens.numel() % requests:
        return
    longest = seq_lens.view(requests, -1).amax(1, keepdim=True)
    used = torch.arange(block_table.size(1), device=block_table.device) * block_size < longest
    good = ~used | ((block_table >= 0) & (block_table < num_blocks))
    _check_values("block_table", block_table, good, f"blocks 0..{num_blocks - 1} wherever seq_lens reach")


def _check_page_ids(
    page_ids: Tensor, page_counts: Tensor | None, seq_lens: Tensor, page_size: int, table_tokens: int
) -> None:
    if not (_has_values(page_ids, (3,), torch.int32) and _has_values(seq_lens, (1,), torch.int32)):
        return
    if page_ids.device != seq_lens.device or page_ids.size(0) != seq_lens.size(0):
        return
    if page_counts is None:
        counts = (page_ids >= 0).cumprod(2).sum(2)
    elif not _has_values(page_counts, (2,), torch.int32) or page_counts.shape != page_ids.shape[:2]:
        return
    else:
        counts = page_counts
    pages = ((seq_lens.long().clamp(0, table_tokens) + page_size - 1) // page_size)[:, None, None]
    place = torch.arange(page_ids.size(2), device=page_ids.device)
    listed = place < counts[..., None]
    in_range = (page_ids >= 0) & (page_ids < pages)
    _check_values("page_ids", page_ids, ~listed | in_range, "pages of the row, 0..ceil(seq_len / page_size) - 1")
    ascending = torch.cat([torch.ones_like(listed[..., :1]), page_ids[..., 1:] > page_ids[..., :-1]], 2)
    _check_values("page_ids", page_ids, ~listed | ascending, "ascending pages")


def _fake(op: str):
    """Registers a fake. torch also calls it for real tensors where one of them is a meta tensor: that is an error."""
    names = [argument.name for argument in getattr(_ops, op).default._schema.arguments]

    def register(fake):
        def checked(*inputs, **options):
            given = dict(zip(names, inputs, strict=False)) | options
            (first, device), *others = ((name, x.device) for name, x in given.items() if isinstance(x, Tensor))
            for name, other in others:
                if other != device:
                    raise RuntimeError(f"quest_ops: {name} is on {other}, but {first} is on {device}")
            return fake(*inputs, **options)

        torch.library.register_fake(f"quest_ops::{op}", checked)
        return fake

    return register


@_fake("append_paged_kv")
def _(key, value, k_cache, v_cache, page_metadata, slot_mapping, *, bound="minmax", bound_scale=1.0):
    return None


@_fake("update_page_metadata")
def _(k_cache, page_metadata, block_table, seq_lens, start_lens, *, bound="minmax", bound_scale=1.0):
    return None


@_fake("estimate_page_scores")
def _(query, page_metadata, block_table, seq_lens, page_size, head_reduction, *, bound="minmax"):
    parts = _parts(page_metadata)
    heads = query.size(1) if head_reduction == "none" else page_metadata.size(1)
    return query.new_empty((query.size(0), heads, block_table.size(1) * parts), dtype=torch.float32)


@_fake("select_topk_pages")
def _(scores, seq_lens, page_size, page_budget, sink_pages, recent_pages, *, page_budgets=None):
    rows, heads, _ = scores.shape
    return scores.new_empty((rows, heads, page_budget), dtype=torch.int32), scores.new_empty(
        (rows, heads), dtype=torch.int32
    )


@_fake("sparse_decode_attention")
@_fake("quest_decode_attention")
@_fake("quest_decode_step")
def _(query, *inputs, **options):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)


@_fake("sparse_decode_attention_out")
@_fake("quest_decode_attention_out")
@_fake("quest_decode_step_out")
def _(*inputs, **outputs):
    return None
