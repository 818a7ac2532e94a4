"""QuestConfig: which pages a decode step keeps, and when it attends to everything instead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

PAGE_SIZES = (4, 8, 16, 32, 64, 128)
HEAD_REDUCTIONS = ("max", "mean", "none")
BOUNDS = ("minmax", "cuboid", "mean_std", "principal")
BLOCK_TOKENS = 16
FLOAT32 = torch.finfo(torch.float32)
NARROW_METADATA = {8: torch.float8_e4m3fn, 4: torch.uint8}  # by the bits of a number
METADATA_DTYPES = (torch.bfloat16, torch.float16, torch.float32, *NARROW_METADATA.values())


def metadata_shape(dtype: torch.dtype, head_dim: int) -> tuple[int, ...]:
    """Of one page and KV head's metadata: (2, D); in 4 bits, dtype uint8, (9 * D // 8,) bytes (quest_ops/ops.py)."""
    return (9 * head_dim // 8,) if dtype == torch.uint8 else (2, head_dim)


def metadata_size(dtype: torch.dtype) -> float:
    """Bytes a number of page metadata, those of its share of a scale included."""
    return 9 / 16 if dtype == torch.uint8 else float(dtype.itemsize)


def check_int(name: str, value: object, minimum: int) -> int:
    """`value` if it is an int (bool is not) of at least `minimum`; else TypeError or ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_head_budgets(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    """`value` as tuples, if it is one list or tuple of ints of at least 1 for each layer, of equal length; else
    TypeError or ValueError that names it."""
    if not isinstance(value, (tuple, list)) or not all(isinstance(heads, (tuple, list)) for heads in value):
        raise TypeError(f"{name} must be a tuple of tuples, tokens of each layer's KV heads, got {str(value)[:60]!r}")
    if not value or not value[0] or {len(heads) for heads in value} != {len(value[0])}:
        sizes = [len(heads) for heads in value]
        raise ValueError(f"{name} must have a layer or more, of equally many KV heads, 1 or more; got heads {sizes}")
    for layer, heads in enumerate(value):
        for head, tokens in enumerate(heads):
            if check_int(f"{name}[{layer}][{head}]", tokens, 1) >= 2**31:
                raise ValueError(f"{name}[{layer}][{head}] must fit int32, got {tokens}")
    return tuple(map(tuple, value))


@dataclass(frozen=True)
class QuestConfig:
    """Settings of Quest sparse attention (Tang et al., ICML 2024). Lengths are in tokens, per sequence.

    The defaults of page_size, metadata_dtype, bound and bound_scale together are what does best at the paper's bytes of
    metadata in docs/accuracy.md, "Loss, and answers found", by its table of policies ("principal 1, pages of 8,
    4-bit"). They fit the defaults of PagedKVCache. The paper's own choice is `QuestConfig.paper()`.

    page_size: tokens a page: 4, 8, 16, 32, 64 or 128; the cache's. Chosen by the table of policies; for contexts of
        few budgets or more than 16 others are better (`for_context`).
    token_budget: most tokens a decode row attends to, sink and recent ones included; rounded down to whole pages.
        budget_ratio lets it grow with the row's length, head_budgets shares it out among layers and heads.
    sink_tokens, recent_tokens: first and last tokens that are always attended to; rounded up to whole pages. At least
        one recent page is kept: the one being written.
    dense_layers: numbers of the layers that always attend to the whole cache.
    head_reduction: how the query heads that share a KV head agree on pages: "max" or "mean" of their scores, or "none":
        each query head selects for itself.
    metadata_dtype: dtype that the cache's page metadata must have: the cache's; float8_e4m3fn, half of 16 bits to keep
        and to read ("minmax" is still a bound of keys of magnitude up to 448); or uint8, 4 bits a number and a scale
        for 32 of them, 9/32 of 16 bits (a bound up to 458528); None: whatever the cache has, and its dtype where this
        library makes the cache. Chosen by the table of policies: 4 bits lose no more than 8.
    dense_below: rows of at most this many tokens attend to all of them, in a decode step beside any others; None: as
        many as fill the pages of the budget, and on a GPU of compute capability 9.0 or later up to where Quest is
        faster (`planner.plan_dense_length`). `QuestAttention.dense_length` is the number.
    bound: what a page's metadata is, over its keys: channel by channel "minmax", the paper's, an upper bound of every
        score; "cuboid": mean -+ mean absolute deviation; "mean_std": mean -+ standard deviation; or "principal": two
        points, mean -+ deviation to either side along the axis on which the keys deviate most. Chosen by the table of
        policies.
    bound_scale: factor on the deviation; 1 for "minmax". By the table of policies 0.75 and 1.25 are no better.
    budget_ratio: None, or a share between 0 and 1: token_budget is then the least that a row attends to, and of n
        tokens it attends to budget_ratio * n where that is more, rounded down to whole pages (`row_page_budget`).
    head_budgets: None, or tokens for each layer and KV head, [layers][KV heads], in place of token_budget, which must
        be their mean, both rounded down; each is rounded down to whole pages. See `with_head_budgets`. With
        head_reduction "none" each query head of a KV head gets the KV head's; with budget_ratio all grow in proportion.
        What is said for dense_layers is not used.
    select_every: n, 1 (every step) to page_size: a sequence chooses its pages when its new token is number 0, n, 2 n,
        ... of its page, and attends to the same ones in between. The first token of a page always chooses, so no page
        is newer than the choice: the page being written is attended to, and the budget holds. A sequence also chooses
        in its first decode step, after a rollback, a prefill step or a step of several rows, in another slot of the
        batch than in its last step, and where it outgrows `dense_below`. All of these are its own: what it attends to
        does not depend on the other sequences of a step. Steps of several rows a sequence always choose.

    Raises TypeError or ValueError for a value that is not supported, and where the budget cannot hold the sink pages,
    the recent pages and one page to choose.
    """

    page_size: int = 8
    token_budget: int = 2048
    sink_tokens: int = 16
    recent_tokens: int = 64
    dense_layers: tuple[int, ...] = ()
    head_reduction: str = "max"
    metadata_dtype: torch.dtype | None = torch.uint8
    dense_below: int | None = None
    bound: str = "principal"
    bound_scale: float = 1.0
    budget_ratio: float | None = None
    head_budgets: tuple[tuple[int, ...], ...] | None = None
    select_every: int = 1

    def __post_init__(self) -> None:
        check_int("page_size", self.page_size, 1)
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {self.page_size}")
        check_int("token_budget", self.token_budget, 1)
        if self.token_budget >= 2**31:
            raise ValueError(f"token_budget must fit int32, got {self.token_budget}")
        check_int("sink_tokens", self.sink_tokens, 0)
        check_int("recent_tokens", self.recent_tokens, 1)
        if self.dense_below is not None:
            check_int("dense_below", self.dense_below, 0)
        if not isinstance(self.dense_layers, (tuple, list)):
            raise TypeError(f"dense_layers must be a tuple of layer numbers, got {self.dense_layers!r}")
        for layer in self.dense_layers:
            check_int("each of dense_layers", layer, 0)
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.head_reduction not in HEAD_REDUCTIONS:
            raise ValueError(f"head_reduction must be one of {HEAD_REDUCTIONS}, got {self.head_reduction!r}")
        if self.bound not in BOUNDS:
            raise ValueError(f"bound must be one of {BOUNDS}, got {self.bound!r}")
        if isinstance(self.bound_scale, bool) or not isinstance(self.bound_scale, (int, float)):
            raise TypeError(f"bound_scale must be a number, got {self.bound_scale!r}")
        if not FLOAT32.tiny <= self.bound_scale <= FLOAT32.max:
            raise ValueError(f"bound_scale must be a positive float32 number, got {self.bound_scale}")
        if self.bound == "minmax" and self.bound_scale != 1:
            raise ValueError(f"bound_scale must be 1 for bound 'minmax', got {self.bound_scale}")
        object.__setattr__(self, "bound_scale", float(self.bound_scale))
        if check_int("select_every", self.select_every, 1) > self.page_size:
            raise ValueError(
                f"select_every must be 1 to page_size = {self.page_size}, got {self.select_every}: "
                "a page's first token always chooses pages"
            )
        if self.metadata_dtype is not None and not isinstance(self.metadata_dtype, torch.dtype):
            raise TypeError(f"metadata_dtype must be None or a torch.dtype, got {self.metadata_dtype!r}")
        if self.metadata_dtype not in (None, *METADATA_DTYPES):
            raise ValueError(f"metadata_dtype must be None or one of {METADATA_DTYPES}, got {self.metadata_dtype}")
        needed = self.sink_pages + self.recent_pages + 1
        if self.page_budget < needed:
            raise ValueError(
                f"token_budget {self.token_budget} is {self.page_budget} pages of {self.page_size} tokens; it must "
                f"hold sink ({self.sink_pages}) + recent ({self.recent_pages}) + 1 pages: "
                f"at least {needed * self.page_size}"
            )
        if self.budget_ratio is not None:
            if isinstance(self.budget_ratio, bool) or not isinstance(self.budget_ratio, (int, float)):
                raise TypeError(f"budget_ratio must be None or a number, got {self.budget_ratio!r}")
            if not 0 < self.budget_ratio < 1:
                raise ValueError(f"budget_ratio must be between 0 and 1, both excluded, got {self.budget_ratio}")
        if self.head_budgets is not None:
            self._check_head_budgets(needed * self.page_size)

    def _check_head_budgets(self, least: int) -> None:
        budgets = check_head_budgets("head_budgets", self.head_budgets)
        object.__setattr__(self, "head_budgets", budgets)
        for layer, heads in enumerate(budgets):
            for head, tokens in enumerate(heads):
                if tokens < least:
                    raise ValueError(
                        f"head_budgets[{layer}][{head}] is {tokens} tokens; it must hold sink ({self.sink_pages}) + "
                        f"recent ({self.recent_pages}) + 1 pages of {self.page_size}: at least {least}"
                    )
        mean = sum(map(sum, budgets)) // (len(budgets) * len(budgets[0]))
        if self.token_budget != mean:
            raise ValueError(f"token_budget must be the mean of head_budgets, {mean}, got {self.token_budget}")

    @classmethod
    def paper(cls, **settings) -> QuestConfig:
        """The paper's setting: minimum and maximum of pages of 16 in the cache's dtype, no sink, one recent page, and
        layers 0 and 1 dense. `settings` override single fields.

        Its cache: `PagedKVCache(..., page_size=16, pages_per_block=1, metadata_dtype=None)`.
        """
        policy = {
            "page_size": 16,
            "bound": "minmax",
            "metadata_dtype": None,
            "sink_tokens": 0,
            "recent_tokens": 1,
            "dense_layers": (0, 1),
        }
        return cls(**policy | settings)

    @classmethod
    def for_context(cls, tokens: int, token_budget: int = 2048, **settings) -> QuestConfig:
        """For contexts of about `tokens`: the page size that loses least there, by docs/accuracy.md ("Longer contexts",
        "Pages of 4"), and a budget that fits what is read of metadata.

        Pages of 4 up to 8 budgets of context, and up to 16 where that is up to 16,384 tokens, if the budget is 256 or
        more (they take longer to choose: docs/performance.md); of 8 up to 16 budgets, of 16 up to 64, else of 32. With
        pages of 4 as many bytes are read as with the paper's policy, pages of 16 in 16 bits, at `token_budget`: the
        budget is smaller by 1/128 of `tokens`. With larger ones as many as with pages of 8: it is larger by 9/512 or
        27/1024. `settings` are the other fields; with page_size or metadata_dtype among them there is nothing left to
        choose: TypeError.
        """
        check_int("tokens", tokens, 1)
        check_int("token_budget", token_budget, 1)
        for name in ("page_size", "metadata_dtype"):
            if name in settings:
                raise TypeError(f"for_context chooses {name}, got {settings[name]!r}")
        budgets = tokens / token_budget
        page_size = 8 if budgets <= 16 else 16 if budgets <= 64 else 32
        few = budgets <= 8 or (budgets <= 16 and tokens <= 16384)
        if few and token_budget >= 256:  # a smaller one has no room beside sink and recent tokens
            page_size = 4
        # In K and V of a token, of 16 bits: a page's metadata is 9/32, of one of the paper's 1.
        allowed = tokens // 16 if page_size == 4 else 9 * (tokens // 8) // 32
        saved = allowed - 9 * (tokens // page_size) // 32
        return cls(page_size=page_size, token_budget=token_budget + saved, **settings)

    @classmethod
    def with_head_budgets(cls, path: str | Path, **settings) -> QuestConfig:
        """Budgets by layer and KV head from a file of `quest-ops calibrate`, and what they were measured with: its
        page_size, bound, bound_scale and token_budget, which must stay, sink_tokens and recent_tokens. `settings` are
        the other fields.

        Raises OSError, ValueError for a file of another form (see `load_head_budgets`), and as QuestConfig does.
        """
        from quest_ops.head_budgets import load_head_budgets

        of_file = load_head_budgets(path)
        for name in ("page_size", "bound", "bound_scale", "token_budget"):
            theirs = getattr(of_file, name)
            if settings.setdefault(name, theirs) != theirs:
                raise ValueError(f"{name} must be {theirs!r}, as the budgets of {path} need it, got {settings[name]!r}")
        settings = {"sink_tokens": of_file.sink_tokens, "recent_tokens": of_file.recent_tokens} | settings
        return cls(head_budgets=of_file.tokens, **settings)

    @property
    def block_size(self) -> int:
        """Tokens of a block where this library makes the cache: 16, or a page where that has more."""
        return max(BLOCK_TOKENS, self.page_size)

    @property
    def page_budget(self) -> int:
        """Pages a row attends to at most, but for budget_ratio and head_budgets."""
        return self.token_budget // self.page_size

    def row_page_budget(self, tokens: int) -> int:
        """Pages that a row of so many tokens attends to at most, for each head; the mean where heads differ."""
        if self.budget_ratio is None:
            return self.page_budget
        return max(self.page_budget, int(self.budget_ratio * tokens) // self.page_size)

    @property
    def head_page_budgets(self) -> tuple[tuple[int, ...], ...] | None:
        """head_budgets in pages."""
        if self.head_budgets is None:
            return None
        return tuple(tuple(tokens // self.page_size for tokens in heads) for heads in self.head_budgets)

    @property
    def sink_pages(self) -> int:
        """Leading pages that are always attended to."""
        return -(-self.sink_tokens // self.page_size)

    @property
    def recent_pages(self) -> int:
        """Trailing pages that are always attended to, the one being written included."""
        return -(-self.recent_tokens // self.page_size)
