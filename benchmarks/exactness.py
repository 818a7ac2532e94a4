"""Whether quest_decode_attention in one call chooses the pages that the separate ops choose, and attends to just them.

Its choice is made visible: it depends on queries and metadata alone. So with keys of zero, where all chosen tokens
weigh the same, a value that is 1 on a single page and 0 elsewhere shows in the output whether that page was chosen.
"""

import copy
import math

import torch
from cases import Layers, Pages
from torch import Tensor

from quest_ops import reference

# In units of eps(dtype) times the mean of |v| by the same weights: half a unit for weights that are rounded to a
# dtype of 16 bits, half for the output, and some room for sums in float32.
OUT_ROUNDING = 1.25
# As the tests have them.
LSE_ROUNDING = 1e-3
SCORE_ROUNDING = 3e-5  # of the sum of the products' magnitudes


def chosen_pages(layers: Layers, i: int, pages: Pages) -> Tensor:
    """bool [R, Hkv, P]: which pages the op in one call attends to."""
    case, parts = layers.case, layers.case.block_size // pages.size
    layers.metadata(pages)  # that of the real keys
    device, group, num_pages = layers.table.device, case.query_heads // case.kv_heads, layers.table.size(1) * parts
    page = torch.zeros(sum(case.blocks), device=device, dtype=torch.int32)  # of a block's first token
    for row, blocks in zip(layers.table, case.blocks):
        page[row[:blocks].long()] = parts * torch.arange(blocks, device=device, dtype=torch.int32)
    page = page[:, None] + torch.arange(case.block_size, device=device, dtype=torch.int32) // pages.size
    probe, pool = copy.copy(layers), torch.zeros_like(layers.pools[i])
    probe.k, probe.v = ([view] * layers.count for view in layers.keys_and_values(pool))
    channel, found = torch.arange(case.head_dim, device=device, dtype=torch.int32), []
    for first in range(0, num_pages, case.head_dim):
        probe.v[i].copy_((page - first)[:, :, None, None] == channel)
        found.append(probe.quest(i, pages, workspace=layers.workspace)[:, ::group] > 0)
    return torch.cat(found, -1)[..., :num_pages]


def is_tie(layers: Layers, i: int, pages: Pages, row: int, head: int, lost: Tensor, gained: Tensor) -> bool:
    """Whether a choice of the pages `gained` instead of `lost` (page numbers) is one that rounding explains.

    Their scores agree within rounding, none of them is always kept, and of pages with the same metadata, which have the
    same score on every path, the earlier one was chosen.
    """
    case, parts = layers.case, layers.case.block_size // pages.size
    last = math.ceil(case.lengths[row] / pages.size) - pages.recent
    if len(lost) != len(gained) or lost.min() < pages.sink or lost.max() >= last:
        return False
    query = layers.queries[i][row].double().unflatten(0, (case.kv_heads, -1))[head]  # [G, D]

    def of(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stored = layers.metadata(pages)[i][layers.table[row, numbers // parts].long(), head, numbers % parts]
        bounds = reference.numbers_of(stored, torch.float64)
        lo, hi = bounds.unbind(1)
        scores = reference.scores_of_pages(query, lo, hi, pages.bound)
        return bounds, scores.amax(0), (query.abs() @ bounds.abs().amax(1).T).amax(0)

    (bounds, score, size), (other_bounds, other_score, other_size) = of(lost), of(gained)
    apart = (score[:, None] - other_score).abs()
    later = (bounds[:, None] == other_bounds).flatten(2).all(-1) & (lost[:, None] < gained)
    return bool((apart <= SCORE_ROUNDING * (size[:, None] + other_size)).all() and not later.any())


def check_layer(layers: Layers, i: int, pages: Pages) -> dict:
    """Counts and largest errors of a layer; `summary` says what they are."""
    case, lens = layers.case, layers.lens
    out, lse = layers.quest_and_lse(i, pages, workspace=layers.workspace)
    scores = layers.estimate(i, pages)
    page_ids, page_counts = layers.select(scores, pages)
    separate = layers.attend(i, page_ids, page_counts, pages)

    found, number = chosen_pages(layers, i, pages), torch.arange(scores.size(-1), device=lens.device)
    listed = torch.arange(page_ids.size(-1), device=lens.device) < page_counts[..., None]
    expected = found.new_zeros(*found.shape[:2], found.size(-1) + 1)
    expected = expected.scatter_(-1, page_ids.long().where(listed, found.size(-1)), True)[..., :-1]
    other = (found != expected).any(-1)  # [R, Hkv]
    ties = 0
    for row, head in other.nonzero().tolist():
        mine, theirs = found[row, head], expected[row, head]
        ties += is_tie(layers, i, pages, row, head, number[theirs & ~mine], number[mine & ~theirs])

    counts = found.sum(-1)
    ids = number.where(found, len(number)).sort(-1).values[..., : int(counts.max())]
    inputs = layers.queries[i].double(), layers.k[i]
    choice = {"page_size": pages.size, "page_ids": ids, "page_counts": counts}
    exact, exact_lse = reference.sparse_decode_attention(*inputs, layers.v[i], layers.table, lens, **choice)
    size, _ = reference.sparse_decode_attention(*inputs, layers.v[i].abs(), layers.table, lens, **choice)
    unit = (torch.finfo(out.dtype).eps * size).clamp(min=torch.finfo(torch.float32).tiny)
    error, separate_error = (((x.double() - exact).abs() / unit).amax(-1) for x in (out, separate))  # [R, Hq]
    separate_error = separate_error.masked_fill(other.repeat_interleave(case.query_heads // case.kv_heads, 1), 0)
    lse_error = (lse.double() - exact_lse).abs()
    right = (error <= OUT_ROUNDING) & (separate_error <= OUT_ROUNDING) & (lse_error <= LSE_ROUNDING)  # NaN is not

    ranked = (number >= pages.sink) & (number < (-(-lens // pages.size) - pages.recent)[:, None, None])
    lowest = scores.masked_fill(~(expected & ranked), torch.inf).amin(-1)
    best_left = scores.masked_fill(expected | ~ranked, -torch.inf).amax(-1)
    return {
        "outputs": right.numel(), "differing": int((~right).sum()), "choices": other.numel(),
        "other_choices": int(other.sum()), "ties": ties, "equal_at_the_cut": int((lowest == best_left).sum()),
        "error": error.max().item(), "separate_error": separate_error.max().item(), "lse_error": lse_error.max().item(),
    }  # fmt: skip


def summary(layers: Layers, pages: Pages) -> dict:
    """Over all layers.

    outputs, differing: query heads of rows, and those whose output or lse, or the separate ops' output where they
        chose the same pages, is further than rounding from float64 attention to the pages that the op chose.
    choices, other_choices, ties: KV heads of rows, those with other pages than the separate ops choose, and of these
        those that rounding explains.
    equal_at_the_cut: choices in which a page that is left out scores exactly as the lowest that is not.
    error, separate_error, lse_error: the largest; of an output's element in OUT_ROUNDING's units.
    """
    found = [check_layer(layers, i, pages) for i in range(layers.count)]
    # Of tensors: a NaN stays one.
    return {
        key: torch.tensor([x[key] for x in found]).max().item() if key.endswith("error") else sum(x[key] for x in found)
        for key in found[0]
    }


def is_exact(found: dict) -> bool:
    return found["differing"] == 0 and found["other_choices"] == found["ties"]
