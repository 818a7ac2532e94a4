"""What accuracy.py compares: ways to choose the pages that a decode step attends to, at equal budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quest_ops import QuestConfig
from quest_ops.config import NARROW_METADATA, metadata_size
from quest_ops.head_budgets import load_head_budgets

BLOCK_SIZE = 16  # tokens of a block in the documents' cache, and in that of every policy whose pages fit one


@dataclass(frozen=True)
class Policy:
    """paper: no sink, one recent page, the first two layers dense; else one sink page and 64 recent tokens (32 where
    the budget is below 512). recent_only: the sink and the most recent pages, chosen without metadata. oracle: pages
    chosen by their true attention mass, which takes all keys: how well any choice of as many pages could do.
    metadata_bits: of a number of it, 16 (those of the cache's dtype), 8 or 4.
    head_budgets: tokens of each layer and KV head, as many on average as the one budget that they are for.
    select_every: as of QuestConfig; above 1, decoding is one token of a sequence a step.
    equal_bytes: 0, or the metadata_bytes of what it is compared with: what it reads less of it than that it spends on
    a larger budget, and what it reads more on a smaller one.
    ratio: the budget grows with the context, by budget_ratio as of QuestConfig, which `over` finds.
    top_p: a row and KV head attends to the fewest pages whose masses, as the bounds have them, add up to p: of the sum
    over all pages of tokens * exp(bound). `forced.Documents.tuned` finds the p of an average budget."""

    name: str
    bound: str = "minmax"
    bound_scale: float = 1.0
    page_size: int = 16
    metadata_bits: int = 16
    paper: bool = False
    recent_only: bool = False
    oracle: bool = False
    head_budgets: tuple[tuple[int, ...], ...] | None = None
    select_every: int = 1
    equal_bytes: float = 0
    ratio: bool = False
    budget_ratio: float | None = None
    top_p: bool = False
    p: float | None = None

    @property
    def plain(self) -> bool:
        """Whether its bound and pages, chosen by it in every step, are all that it is."""
        return self.fixed and not (self.paper or self.recent_only or self.oracle or self.equal_bytes)

    @property
    def fixed(self) -> bool:
        """Whether it chooses in every step, and as many pages for every row."""
        return self.select_every == 1 and not self.ratio and not self.top_p

    def over(self, contexts: list[int], budget: int) -> Policy:
        """With a ratio, the policy whose budgets at some contexts have the mean `budget`."""
        return replace(self, budget_ratio=budget * len(contexts) / sum(contexts)) if self.ratio else self

    def budget_at(self, budget: int, context: int) -> int:
        """Tokens that it may attend to after `context` ones, in whole pages, where the defaults have `budget`.

        With equal_bytes a step reads as many bytes: a page's metadata is two vectors, as K and V of a token are, so in
        units of the latter that of all pages is context / 16 * metadata_bytes.
        """
        if self.equal_bytes:
            budget += int(context / 16 * (self.equal_bytes - self.metadata_bytes))
        return budget // self.page_size * self.page_size

    def config(self, budget: int) -> QuestConfig:
        settings = {
            "page_size": self.page_size,
            "token_budget": budget,
            "dense_below": budget,  # also where dense attention is faster: what is compared is the choice
            "bound": self.bound,
            "bound_scale": self.bound_scale,
            "select_every": self.select_every,
            "metadata_dtype": self.metadata_dtype,
            "head_budgets": self.head_budgets,
        }
        if self.paper:
            return QuestConfig.paper(**settings)
        # A budget has room for a page to choose. All scores being equal, that is the first one: a second sink page.
        recent = budget - 2 * self.page_size if self.recent_only else 64 if budget >= 512 else 32
        if self.budget_ratio is not None:
            least = 16 + recent + self.page_size
            settings |= {"budget_ratio": self.budget_ratio, "token_budget": least, "dense_below": least}
        return QuestConfig(sink_tokens=16, recent_tokens=recent, **settings)

    @property
    def metadata_dtype(self) -> torch.dtype | None:
        """None: the cache's."""
        return None if self.metadata_bits == 16 else NARROW_METADATA[self.metadata_bits]

    @property
    def metadata_bytes(self) -> float | None:
        """Of a token, in units of the paper's: pages of 16, 16 bits a number. None: the oracle's are all keys."""
        if self.oracle:
            return None
        size = metadata_size(self.metadata_dtype or torch.bfloat16)
        return 0.0 if self.recent_only else 16 / self.page_size * size / 2


BEST = Policy("principal 1, pages of 8, 4-bit", bound="principal", page_size=8, metadata_bits=4)
EIGHT_BIT = replace(BEST, name="principal 1, pages of 8, 8-bit", metadata_bits=8)
# Those of one cache layout stand together.
POLICIES = (
    Policy("paper", paper=True),
    Policy("sink + recent", recent_only=True),
    Policy("minmax"),
    Policy("cuboid", bound="cuboid"),
    Policy("mean_std 1", bound="mean_std"),
    Policy("oracle", oracle=True),
    BEST,
    *(replace(BEST, name=f"{BEST.name}, select every {n}", select_every=n) for n in (2, 4, 8)),
    replace(BEST, name="principal 1, pages of 4, 4-bit", page_size=4),
    Policy("minmax, pages of 8, 8-bit", page_size=8, metadata_bits=8),
    EIGHT_BIT,
    replace(EIGHT_BIT, name="mean_std 1, pages of 8, 8-bit", bound="mean_std"),
    replace(EIGHT_BIT, name="mean_std 1.5, pages of 8, 8-bit", bound="mean_std", bound_scale=1.5),
)
# These, by name alone.
NAMED = (
    *(
        Policy(
            f"{bound} 1, pages of {size}, 8-bit, equal bytes", bound=bound, page_size=size, metadata_bits=8,
            equal_bytes=EIGHT_BIT.metadata_bytes,
        )
        for bound in ("mean_std", "principal")
        for size in (16, 32)
    ),
    *(
        replace(
            BEST, name=f"principal 1, pages of {size}, 4-bit, equal bytes", page_size=size,
            equal_bytes=BEST.metadata_bytes,
        )
        for size in (4, 16, 32)
    ),
    replace(BEST, name="principal 1, pages of 4, 4-bit, the paper's bytes", page_size=4, equal_bytes=1.0),
    Policy("oracle, pages of 4", page_size=4, oracle=True),
    *(replace(EIGHT_BIT, name=f"principal {scale:g}, pages of 8, 8-bit", bound_scale=scale) for scale in (0.75, 1.25)),
    replace(BEST, name=f"{BEST.name}, ratio", ratio=True),
    replace(BEST, name=f"{BEST.name}, top-p", top_p=True),
)  # fmt: skip
ALL = (*POLICIES, *NAMED)


def calibrated(path: Path) -> tuple[Policy, int]:
    """The policy of ALL that a file of `quest-ops calibrate` was measured with, with its budgets by layer and
    head, and the budget that it is for. Raises OSError, or ValueError where there is no such policy or file."""
    found = load_head_budgets(path)
    measured = found.bound, found.bound_scale, found.page_size
    for policy in ALL:
        if policy.plain and (policy.bound, policy.bound_scale, policy.page_size) == measured:
            return replace(policy, name=f"{policy.name}, by head", head_budgets=found.tokens), found.token_budget
    raise ValueError(
        f"{path}: no policy here has pages of {found.page_size} with bound {found.bound} {found.bound_scale:g}"
    )
