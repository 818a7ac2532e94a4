"""The ops in plain PyTorch: same names, same signatures, row by row, slow and obviously right.

Half-precision inputs are computed in float32; float64 inputs stay float64 throughout, scores and lse included.
Arguments are not checked here: the compiled ops do that.
"""

import functools

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_FP8_GRID = torch.arange(256, dtype=torch.uint8).view(_FP8).float()
_FP8_GRID = torch.unique(_FP8_GRID[~_FP8_GRID.isnan()] + 0.0)  # ascending, one zero

_SCALED_CHANNELS = 32  # of metadata in 4 bits: how many a scale serves


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
    """Write `key`, `value` `[X, Hkv, D]` to slots `slot_mapping` `[N <= X]` and refresh the metadata of those pages.

    A slot is `block * S + offset`; a negative one is skipped. The metadata of a touched page is that of the stored keys
    at offsets 0 to the highest one written by this call.
    """
    tokens_per_block = k_cache.size(1)
    metadata = _with_parts(page_metadata)
    page_size = tokens_per_block // metadata.size(2)
    highest = {}  # (block, part) -> highest offset written in that page
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, tokens_per_block)
        k_cache[block, offset] = key[row].to(k_cache.dtype)
        v_cache[block, offset] = value[row].to(v_cache.dtype)
        page = (block, offset // page_size)
        highest[page] = max(highest.get(page, 0), offset % page_size)
    for (block, part), offset in highest.items():
        start = part * page_size
        _store_bounds(metadata[block, :, part], k_cache[block, start : start + offset + 1], bound, bound_scale)


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
    """Recompute the metadata of every page that holds a token of `[start_lens[b], seq_lens[b])`, for each request b."""
    metadata = _with_parts(page_metadata)
    parts = metadata.size(2)
    page_size = k_cache.size(1) // parts
    for b, (length, start) in enumerate(zip(seq_lens.tolist(), start_lens.tolist(), strict=True)):
        length = _clamp_length(length, block_table.size(1) * k_cache.size(1))
        start = max(start, 0)
        if start >= length:
            continue
        for page in range(start // page_size, _ceil_div(length, page_size)):
            block, part = int(block_table[b, page // parts]), page % parts
            first, stop = part * page_size, part * page_size + min(page_size, length - page * page_size)
            _store_bounds(metadata[block, :, part], k_cache[block, first:stop], bound, bound_scale)


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
    """The score of every page: `sum_d max(q_d * lo_d, q_d * hi_d)` (QUEST, Tang et al. 2024); with metadata of bound
    "principal" `max(q . lo, q . hi)`.

    Returns scores `[R, Hs, P]`, `-inf` past each row's last page. `head_reduction`: "none" (`Hs = Hq`), or over each
    GQA group the "max" or the "mean".
    """
    metadata = _with_parts(page_metadata)
    rows, num_heads, dim = query.shape
    kv_heads, parts = metadata.size(1), metadata.size(2)
    num_pages_max = block_table.size(1) * parts
    compute = _compute_dtype(query, metadata)
    grouped = query.to(compute).view(rows, kv_heads, num_heads // kv_heads, dim)
    score_heads = num_heads if head_reduction == "none" else kv_heads
    scores = torch.full((rows, score_heads, num_pages_max), -torch.inf, dtype=compute, device=query.device)
    for r, length in enumerate(seq_lens.tolist()):
        num_pages = _ceil_div(_clamp_length(length, num_pages_max * page_size), page_size)
        blocks = block_table[r // (rows // block_table.size(0)), : _ceil_div(num_pages, parts)].long()
        stored = metadata[blocks].transpose(1, 2).flatten(0, 1)[:num_pages]
        bounds = numbers_of(stored, compute)  # [num_pages, Hkv, 2, D]
        for h in range(kv_heads):
            lo, hi = bounds[:, h, 0], bounds[:, h, 1]
            q = grouped[r, h]
            of_group = scores_of_pages(q, lo, hi, bound)  # [G, num_pages]
            if head_reduction == "none":
                scores[r, h * len(q) : (h + 1) * len(q), :num_pages] = of_group
            else:
                scores[r, h, :num_pages] = of_group.amax(0) if head_reduction == "max" else of_group.mean(0)
    return scores


def scores_of_pages(query: Tensor, lo: Tensor, hi: Tensor, bound: str) -> Tensor:
    """Scores [G, n] of query heads [G, D] and pages of metadata lo, hi [n, D]."""
    if bound == "principal":
        return torch.maximum(query @ hi.T, query @ lo.T)
    return query.clamp(min=0) @ hi.T + query.clamp(max=0) @ lo.T


def numbers_of(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """lo, hi `[..., 2, D]` in a wider dtype, of metadata in any."""
    return (unpack_bounds(bounds) if bounds.dtype == torch.uint8 else bounds).to(dtype)


def pack_bounds(lo: Tensor, hi: Tensor, outward: bool) -> Tensor:
    """lo, hi `[..., D]` in 4 bits: uint8 `[..., 9 * D / 8]`. `outward`: codes are rounded down for lo and up for hi."""
    codes, scales = zip(_codes(lo, -1 if outward else 0), _codes(hi, 1 if outward else 0), strict=True)
    nibbles = torch.empty(*lo.shape[:-1], 2, lo.size(-1), dtype=torch.uint8, device=lo.device)
    nibbles[..., _nibble_of_channel(lo.size(-1)).to(lo.device)] = (torch.stack(codes, -2) + 8).to(torch.uint8)
    pairs = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return torch.cat([pairs.flatten(-2), torch.cat(scales, -1).view(torch.uint8)], -1)


def unpack_bounds(packed: Tensor) -> Tensor:
    """lo, hi float32 `[..., 2, D]` of uint8 `[..., 9 * D / 8]`, exactly; NaN where a scale is NaN."""
    dim = packed.size(-1) * 8 // 9
    pairs, scales = packed.split([dim, dim // 8], -1)
    nibbles = torch.stack([pairs & 15, pairs >> 4], -1).view(*packed.shape[:-1], 2, dim)
    codes = nibbles[..., _nibble_of_channel(dim).to(packed.device)].float() - 8
    scales = scales.contiguous().view(torch.float16).float().unflatten(-1, (2, -1))
    return codes * scales.repeat_interleave(_SCALED_CHANNELS, -1)


def _codes(x: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Codes -7 to 7 float32 `[..., D]` and scales float16 `[..., D / 32]` of numbers `[..., D]`. side 0: codes to the
    nearest, -1: no code times its scale above its number, 1: none below; but for saturation."""
    x = x.float().unflatten(-1, (-1, _SCALED_CHANNELS))
    largest = x.abs().amax(-1, keepdim=True)
    scale = (largest / torch.full_like(largest, 7)).half()  # a tensor: on a GPU torch multiplies by the reciprocal
    above = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(scale.float() * 7 < largest, above, scale).clamp(max=torch.finfo(torch.float16).max)
    s = scale.float()
    ratio = torch.where(s == 0, 0, x / s)
    if side == 0:
        codes = ratio.round()  # half to even
    elif side < 0:
        codes = ratio.floor()
        codes = codes - (codes * s > x).float()
    else:
        codes = ratio.ceil()
        codes = codes + (codes * s < x).float()
    codes = torch.where(s.isnan(), 0, codes.clamp(-7, 7))
    return codes.flatten(-2), torch.where(s.isnan(), torch.nan, scale).squeeze(-1)


@functools.cache
def _nibble_of_channel(dim: int) -> Tensor:
    """int64 `[D]`: which 4 bits of a vector's codes hold each channel's (csrc/params.h says why)."""
    channel = torch.arange(dim)
    group, word_of_group, i = channel // _SCALED_CHANNELS, channel // 8 % 4, channel % 8
    together = min(dim // _SCALED_CHANNELS, 4)
    word = group // together * 4 * together + word_of_group * together + group % together
    return word * 8 + i % 2 * 4 + i // 2


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
    """The sink pages, the recent pages (at least 1) and the best of the others by score, `page_budget` pages in all.

    NaN ranks above +inf, equal scores go to the earlier page, and all pages are taken where they fit the budget.
    `page_budgets` `[R]` or `[R, Hs]` int32 lowers the budget, clamped to `[sink + recent, page_budget]`.
    Returns page numbers `[R, Hs, page_budget]` int32, ascending, padded with -1, and their counts `[R, Hs]` int32.
    """
    rows, heads, num_pages_max = scores.shape
    page_ids = torch.full((rows, heads, page_budget), -1, dtype=torch.int32, device=scores.device)
    page_counts = torch.zeros((rows, heads), dtype=torch.int32, device=scores.device)
    for r, length in enumerate(seq_lens.tolist()):
        num_pages = _ceil_div(_clamp_length(length, num_pages_max * page_size), page_size)
        for h in range(heads):
            budget = page_budget
            if page_budgets is not None:
                asked = page_budgets[r] if page_budgets.dim() == 1 else page_budgets[r, h]
                budget = min(max(int(asked), sink_pages + recent_pages), page_budget)
            if num_pages <= budget:
                chosen = torch.arange(num_pages, device=scores.device)
            else:
                # torch.sort ranks NaN above +inf and, being stable, leaves equal scores in page order.
                middle = scores[r, h, sink_pages : num_pages - recent_pages]
                best = torch.sort(middle, descending=True, stable=True).indices[: budget - sink_pages - recent_pages]
                sinks = torch.arange(sink_pages, device=scores.device)
                recent = torch.arange(num_pages - recent_pages, num_pages, device=scores.device)
                chosen = torch.cat([sinks, best.sort().values + sink_pages, recent])
            page_ids[r, h, : chosen.numel()] = chosen.int()
            page_counts[r, h] = chosen.numel()
    return page_ids, page_counts


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
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each row over the tokens of its listed pages and of its last page, listed or not.

    `page_ids` `[R, 1 | Hkv | Hq, K]`, None for all pages. Without `page_counts` a list ends at its first -1; a page
    past the row's last one holds no token and adds nothing. Returns out `[R, Hq, D]` and lse `[R, Hq]` (natural log);
    an empty slot gets zero and `-inf`.
    """
    rows, num_heads, dim = query.shape
    tokens_per_block, kv_heads = k_cache.size(1), k_cache.size(2)
    page_size = tokens_per_block if page_size is None else page_size
    parts = tokens_per_block // page_size
    scale = dim**-0.5 if sm_scale is None else sm_scale
    compute = _compute_dtype(query, k_cache)
    out = torch.empty_like(query, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty((rows, num_heads), dtype=compute, device=query.device) if lse is None else lse
    out.zero_()
    lse.fill_(-torch.inf)
    for r, length in enumerate(seq_lens.tolist()):
        length = _clamp_length(length, block_table.size(1) * tokens_per_block)
        if length == 0:
            continue
        num_pages = _ceil_div(length, page_size)
        blocks_of_request = block_table[r // (rows // block_table.size(0))]
        for h in range(num_heads):
            if page_ids is None:
                pages = torch.arange(num_pages, device=query.device)
            else:
                pages = _listed_pages(page_ids, page_counts, r, h * page_ids.size(1) // num_heads)
                pages = pages[(pages >= 0) & (pages < num_pages - 1)]
                pages = torch.cat([pages, pages.new_tensor([num_pages - 1])])
            positions = (pages[:, None] * page_size + torch.arange(page_size, device=query.device)).flatten()
            positions = positions[positions < length]
            blocks = blocks_of_request[positions // page_size // parts].long()
            offsets = positions % tokens_per_block
            kv_head = h * kv_heads // num_heads
            keys = k_cache[blocks, offsets, kv_head].to(compute)
            values = v_cache[blocks, offsets, kv_head].to(compute)
            logits = keys @ query[r, h].to(compute) * scale
            out[r, h] = (torch.softmax(logits, 0) @ values).to(out.dtype)
            lse[r, h] = torch.logsumexp(logits, 0)
    return out, lse


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
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`estimate_page_scores`, `select_topk_pages` and `sparse_decode_attention` in a row: QUEST's decode step."""
    page_size = k_cache.size(1) // _with_parts(page_metadata).size(2)
    scores = estimate_page_scores(query, page_metadata, block_table, seq_lens, page_size, head_reduction, bound=bound)
    page_ids, page_counts = select_topk_pages(
        scores, seq_lens, page_size, page_budget, sink_pages, recent_pages, page_budgets=page_budgets
    )
    return sparse_decode_attention(
        query,
        k_cache,
        v_cache,
        block_table,
        seq_lens,
        page_ids,
        page_counts,
        page_size=page_size,
        sm_scale=sm_scale,
        out=out,
        lse=lse,
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
    *choice,
    bound: str = "minmax",
    bound_scale: float = 1.0,
    **options,
) -> tuple[Tensor, Tensor]:
    """`append_paged_kv` of each row's last token, then `quest_decode_attention` with `choice` and `options`."""
    block_size, rows_per_request = k_cache.size(1), len(query) // max(len(block_table), 1)
    slots = torch.full((len(query),), -1, dtype=torch.int64, device=query.device)
    for r, length in enumerate(seq_lens.tolist()):
        at = _clamp_length(length, block_table.size(1) * block_size) - 1
        if at >= 0:
            slots[r] = int(block_table[r // rows_per_request, at // block_size]) * block_size + at % block_size
    append_paged_kv(key, value, k_cache, v_cache, page_metadata, slots, bound=bound, bound_scale=bound_scale)
    pools = k_cache, v_cache, page_metadata
    return quest_decode_attention(query, *pools, block_table, seq_lens, *choice, bound=bound, **options)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _clamp_length(length: int, table_tokens: int) -> int:
    return min(max(length, 0), table_tokens)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _with_parts(page_metadata: Tensor) -> Tensor:
    """`[num_blocks, Hkv, M, 2, D]`, in 4 bits `[num_blocks, Hkv, M, 9 * D / 8]`; the form without M means one page a
    block."""
    has_parts = page_metadata.dim() == 5 or page_metadata.dtype == torch.uint8
    return page_metadata if has_parts else page_metadata.unsqueeze(2)


def _listed_pages(page_ids: Tensor, page_counts: Tensor | None, row: int, head: int) -> Tensor:
    listed = page_ids[row, head].long()
    if page_counts is not None:
        return listed[: int(page_counts[row, head])]
    ends = (listed < 0).nonzero()
    return listed[: int(ends[0])] if ends.numel() else listed


def _store_bounds(bounds: Tensor, keys: Tensor, bound: str, bound_scale: float) -> None:
    """Store lo and hi of `keys` `[n, Hkv, D]` into `bounds` `[Hkv, 2, D]`, or in 4 bits `[Hkv, 9 * D / 8]`; NaN stays
    NaN.

    "minmax": channel-wise minimum and maximum. "cuboid", "mean_std": mean -+ bound_scale * mean absolute deviation or
    standard deviation, sums in the order of the tokens. "principal": mean -+ bound_scale * deviation along an axis,
    that of one step of the power method from the key farthest from the mean; the fourth root of the mean fourth power
    of the deviations below the mean, and of those above.
    """
    keys = keys.to(_compute_dtype(keys))
    if bound == "minmax":
        lo, hi = keys.amin(0), keys.amax(0)
    else:
        count = torch.full_like(keys[0], len(keys))  # a tensor: on a GPU torch multiplies by a number's reciprocal
        mean = _sum_in_order(keys) / count
        deviation = keys - mean
        if bound == "principal":
            below, above = _principal_deviations(deviation, bound_scale)
        elif bound == "cuboid":
            above = bound_scale * (_sum_in_order(deviation.abs()) / count)
            below = -above
        else:
            above = bound_scale * _nearest_root(_sum_in_order(deviation * deviation) / count)
            below = -above
        lo, hi = mean + below, mean + above
    # Which of -0 and +0 a min returns depends on the order of the keys: adding +0 leaves one answer.
    lo, hi = lo + 0.0, hi + 0.0
    if bounds.dtype == torch.uint8:
        bounds.copy_(pack_bounds(lo, hi, outward=bound == "minmax"))
        return
    if bounds.dtype == _FP8 and bound == "minmax":
        lo, hi = _to_fp8_outward(lo, up=False), _to_fp8_outward(hi, up=True)
    elif bounds.dtype == _FP8:
        lo, hi = ((x.clamp(-448, 448).to(_FP8).float() + 0.0).to(_FP8) for x in (lo, hi))
    bounds[:, 0] = lo
    bounds[:, 1] = hi


def _principal_deviations(deviation: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[Hkv, D] each, of deviations [n, Hkv, D] from the mean."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        products = a * b
        while products.size(-1) > 1:
            products = products[..., ::2] + products[..., 1::2]
        return products

    squares = dot(deviation, deviation)
    farthest = squares.argmax(0, keepdim=True)  # the first of them
    square = squares.gather(0, farthest)[0]
    start = deviation.gather(0, farthest.expand_as(deviation[:1]))
    length, deviates = _nearest_root(square), square >= torch.finfo(torch.float32).tiny
    axis = _sum_in_order(dot(deviation, start) * torch.where(deviates, 1 / square, 0) * deviation)
    axis_square = dot(axis, axis)
    axis = axis * torch.where(axis_square > 0, 1 / _nearest_root(axis_square), 0)
    along = dot(deviation, axis) * torch.where(deviates, 1 / length, 0)
    fourth = (along * along) * (along * along)
    count = torch.full_like(length, len(deviation))
    reach = torch.tensor(scale, dtype=length.dtype) * length
    fourths = (_sum_in_order(torch.where(side, fourth, 0)) / count for side in (~(along > 0), along > 0))
    below, above = (reach * _nearest_root(_nearest_root(x)) for x in fourths)
    return -below * axis, above * axis


def _nearest_root(x: Tensor) -> Tensor:
    return x.double().sqrt().to(x.dtype)  # torch's float32 root is not the nearest


def _sum_in_order(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[0])
    for each in x:
        total = total + each
    return total


def _to_fp8_outward(x: Tensor, up: bool) -> Tensor:
    """float8_e4m3fn rounded up or down, saturating at +-448; NaN stays NaN, zero is +0."""
    grid = _FP8_GRID.to(x.device)
    x = x.float()
    index = torch.searchsorted(grid, x) if up else torch.searchsorted(grid, x, right=True) - 1
    rounded = grid[index.clamp(0, grid.numel() - 1)]
    return torch.where(x.isnan(), x, rounded).to(_FP8)
