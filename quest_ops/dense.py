"""Dense attention through torch's scaled_dot_product_attention, on the K and V of one sequence taken from the pool."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

MAX_MASK_ELEMENTS = 1 << 22  # 16 MiB of float32: queries beyond it go in pieces


def gather_kv(pool: Tensor, blocks: Tensor | slice, length: int) -> Tensor:
    """K and V [2, Hkv, length, D] of the tokens in some blocks of a layer's pool [num_blocks, 2, Hkv, S, D].

    blocks: a slice of the pool, or an int32 index on its device. Either way the tokens are copied: in the pool K and V,
    and heads within them, alternate from block to block.
    """
    taken = pool[blocks] if isinstance(blocks, slice) else pool.index_select(0, blocks)
    return taken.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


def causal_attention(query: Tensor, keys: Tensor, values: Tensor, sm_scale: float) -> Tensor:
    """Attention of the last n tokens of a sequence to it, each to itself and what is before.

    query [n, Hq, D], keys and values [Hkv, L, D] with L >= n. Returns [n, Hq, D].
    """
    rows, heads, _ = query.shape
    kv_heads, length, _ = keys.shape
    query = query.unflatten(1, (kv_heads, heads // kv_heads))
    if rows == 1:  # nothing is masked: the heads of a group can be the rows of one product, so K is read once
        return F.scaled_dot_product_attention(query, keys[None], values[None], scale=sm_scale).flatten(1, 2)

    from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo, a second that a prefill can afford

    query = query.permute(1, 2, 0, 3)  # [Hkv, G, n, D]
    keys = keys[:, None].expand(-1, heads // kv_heads, -1, -1)
    values = values[:, None].expand_as(keys)
    # On a CPU the causal bias becomes a mask [rows, length]; on a GPU the kernel knows it.
    piece = rows if query.is_cuda else max(1, MAX_MASK_ELEMENTS // length)
    out = query.new_empty(rows, kv_heads, heads // kv_heads, query.size(-1))
    for first in range(0, rows, piece):
        last = min(first + piece, rows)
        seen = length - rows + last
        attended = F.scaled_dot_product_attention(
            query[:, :, first:last],
            keys[:, :, :seen],
            values[:, :, :seen],
            attn_mask=causal_lower_right(last - first, seen),
            scale=sm_scale,
        )
        out[first:last] = attended.permute(2, 0, 1, 3)
    return out.flatten(1, 2)
