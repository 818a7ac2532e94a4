"""quest_ops: query-aware sparse decode attention (QUEST, Tang et al., ICML 2024) as torch custom ops.

The ops are `torch.ops.quest_ops.*`, documented in `quest_ops.ops`; `QuestConfig`, `PagedKVCache` and `QuestAttention`
wire them into an inference loop.
"""

from pathlib import Path

import torch

__version__ = "0.1.0"

_LIBRARY = Path(__file__).with_name("libquest_ops.so")
if not _LIBRARY.exists():
    raise ImportError(
        f"quest_ops has no compiled library at {_LIBRARY}. Build it: `pip install .` in a checkout, or "
        "`pip install -e .` to work on it."
    )
torch.ops.load_library(str(_LIBRARY))

from .attention import QuestAttention
from .cache import OutOfPagesError, PagedKVCache
from .config import QuestConfig
from .ops import (
    append_paged_kv,
    estimate_page_scores,
    quest_decode_attention,
    quest_decode_step,
    select_topk_pages,
    sparse_decode_attention,
    update_page_metadata,
)

__all__ = [
    "OutOfPagesError",
    "PagedKVCache",
    "QuestAttention",
    "QuestConfig",
    "append_paged_kv",
    "estimate_page_scores",
    "quest_decode_attention",
    "quest_decode_step",
    "select_topk_pages",
    "sparse_decode_attention",
    "update_page_metadata",
]
