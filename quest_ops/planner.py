"""From how many tokens on Quest is faster than dense attention: a pure function of sizes."""

from __future__ import annotations

# Fitted to benchmarks/results/break_even-h100.json (docs/performance.md, "When it pays"): the bytes that dense
# attention reads in the time by which Quest starts later, where all of its blocks are on the chip together and where
# they take turns; and the time of a byte that Quest reads, as a multiple of dense attention's.
TOGETHER_BYTES, IN_TURNS_BYTES = 8.9e6, 5e6
BYTE_COST = 0.975

NEVER = 2**31 - 1  # more tokens than a row can have


def plan_dense_length(
    *,
    rows: int,
    kv_heads: int,
    head_dim: int,
    element_size: int,
    metadata_size: float,
    page_size: int,
    page_budget: int,
    num_sms: int,
    budget_ratio: float = 0.0,
) -> int:
    """Longest row, in tokens, that is attended in full because Quest would not be faster: whole pages, never fewer
    than the budget's.

    rows: of a step. element_size, metadata_size: bytes a number of the cache and of its page metadata. num_sms: of
    the GPU. budget_ratio: share of its tokens that a row attends to where that is more than page_budget.

    A token's K and V are b = rows * kv_heads * head_dim * 2 * element_size bytes a layer. Of n tokens dense attention
    reads n * b, Quest (B + n * m) * b: a budget of B = page_budget * page_size tokens, and metadata of a share
    m = metadata_size / (element_size * page_size). They take equally long where

        n * b = X + r * (B + n * m) * b,    so at    n = (X / b + r * B) / (1 - r * m)

    X is Quest's longer start, in bytes, and r the cost of a scattered byte: constants of an H100, X one for steps whose
    blocks fit the chip together and one for others. With a ratio q Quest reads (max(B, q * n) + n * m) * b, and must
    also be past

        n = X / b / (1 - r * (q + m))

    Where the ratio is so large that this never comes, all rows are attended in full: `NEVER` tokens, rounded down.
    """
    # As in csrc/plan.h: two blocks for each (row, KV head).
    together = rows * kv_heads * (1 if head_dim <= 128 else 2) <= num_sms
    start_tokens = (TOGETHER_BYTES if together else IN_TURNS_BYTES) / (rows * kv_heads * head_dim * 2 * element_size)
    budget = page_budget * page_size
    metadata_share = metadata_size / (element_size * page_size)
    tokens = (start_tokens + BYTE_COST * budget) / (1 - BYTE_COST * metadata_share)
    if budget_ratio:
        gain = 1 - BYTE_COST * (budget_ratio + metadata_share)  # of a token, over dense attention's time
        tokens = max(tokens, start_tokens / gain) if gain > 0 else NEVER
    return max(budget, min(int(tokens), NEVER) // page_size * page_size)
