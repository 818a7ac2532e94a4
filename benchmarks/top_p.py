"""Top-p: a row and KV head attends to as many pages as hold a share p of the attention, by what the bounds say."""

import torch
from attend import Step
from torch import Tensor

import quest_ops
from quest_ops import QuestAttention

# What p is sought among: close where a little more of it takes many pages more.
SHARES = torch.linspace(-8, 8, 129, dtype=torch.float64).sigmoid().float()
MOST = 4  # times the average budget


class BoundedMasses(Step):
    """For a decoder: what the bounds say of the pages' masses.

    A page of n tokens whose score is s, of the query head of the group that has most, counts n * exp(sm_scale * s).
    `least` and `most` pages are what a row and KV head may attend to.
    """

    def __init__(self, attention: QuestAttention):
        super().__init__(attention)
        self.least = self.config.sink_pages + self.config.recent_pages + 1
        self.most = MOST * self.config.page_budget

    def counts(self, layer: int, query: Tensor, shares: Tensor) -> Tensor:
        """[R, Hkv, len(shares)] int32: the fewest pages, those always attended to and then the best ones, whose masses
        add up to each share [N] of the whole."""
        config, lengths = self.config, self.attention.seq_lens
        scores = quest_ops.estimate_page_scores(
            query, self.cache.page_metadata(layer), self.attention.request_table, lengths, config.page_size, "max",
            bound=config.bound,
        )  # fmt: skip
        page = torch.arange(scores.size(-1), device=scores.device)
        tokens = (lengths[:, None] - page * config.page_size).clamp(0, config.page_size)  # [R, P]
        pages = -(-lengths[:, None] // config.page_size)
        always = (page < config.sink_pages) | ((page >= pages - config.recent_pages) & (page < pages))
        masses = (self.attention.sm_scale * scores + tokens.log()[:, None]).softmax(-1)
        order = scores.masked_fill(always[:, None], torch.inf).argsort(-1, descending=True)
        reached = masses.gather(-1, order).cumsum(-1)
        wanted = shares.to(reached.device).expand(*reached.shape[:2], -1).contiguous()
        return (torch.searchsorted(reached, wanted) + 1).clamp(self.least, self.most).int()

    def top_p(self, layer: int, query: Tensor, p: float) -> tuple[Tensor, Tensor]:
        """Out [R, Hq, D], and the pages [R, Hkv] attended to."""
        counts = self.counts(layer, query, torch.tensor([p]))[..., 0].contiguous()
        return self.quest(layer, query, self.most, counts)[0], counts


class TopPAttention(BoundedMasses):
    """pages [R]: what a row of the last step attends to, on average over layers and KV heads."""

    def __init__(self, attention: QuestAttention, p: float):
        super().__init__(attention)
        self.p = p

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.append(layer, key, value)
        out, counts = self.top_p(layer, query, self.p)
        self.pages = counts.double().mean(1) / self.cache.num_layers + (self.pages if layer else 0)
        return out


class Tuner(BoundedMasses):
    """Attends with the fixed budget, or with a p found so, and counts the pages that each of SHARES would take."""

    def __init__(self, attention: QuestAttention, p: float | None = None):
        super().__init__(attention)
        self.attend_with = p
        self.sums = torch.zeros(len(SHARES), dtype=torch.float64, device=self.cache.device)
        self.choices = 0

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.append(layer, key, value)
        counts = self.counts(layer, query, SHARES)
        self.sums += counts.double().sum((0, 1))
        self.choices += counts[..., 0].numel()
        if self.attend_with is None:
            return self.quest(layer, query)[0]
        return self.top_p(layer, query, self.attend_with)[0]

    @property
    def p(self) -> float:
        """Whose average is the fixed budget: between two of SHARES, by a straight line."""
        pages, wanted = (self.sums / self.choices).cpu(), self.config.page_budget
        i = int(torch.searchsorted(pages, wanted).clamp(1, len(SHARES) - 1))
        part = (wanted - pages[i - 1]) / (pages[i] - pages[i - 1]).clamp(min=1e-9)
        return float(SHARES[i - 1] + part.clamp(0, 1) * (SHARES[i] - SHARES[i - 1]))
