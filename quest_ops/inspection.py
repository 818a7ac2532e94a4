"""A look inside: which pages Quest chooses after a prompt, by layer, head and step, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quest_ops.attention import QuestAttention
from quest_ops.config import QuestConfig, check_int
from quest_ops.fidelity import Step, compare, relative_error, rounded
from quest_ops.llama.model import Llama

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Inspection:
    """What Quest chose in `steps` decode steps after a prompt, and how far its attention was from dense attention.

    quest: the settings. prompt_tokens: the prompt's length. tokens: the new ones; step i reads tokens[i], at place
        prompt_tokens + i of the text, and writes tokens[i + 1].
    layers: the numbers of the L layers that use Quest.
    pages [steps, L, Hs, K] int32: the chosen pages, or those kept (`quest.select_every`), ascending, padded with -1
        where a head or step has fewer than the most. Hs is Hkv, or with head_reduction "none" Hq.
    missed [steps, L, Hq] float64: the share of the true attention mass that lies outside of the chosen pages.
    error, norm [steps, L, Hq] float64: |out - exact|^2 and |exact|^2 of the attention's output, where `exact` is dense
        attention of the same query to the same cache.
    """

    quest: QuestConfig
    prompt_tokens: int
    tokens: list[int]
    layers: list[int]
    pages: Tensor
    missed: Tensor
    error: Tensor
    norm: Tensor

    @property
    def num_pages(self) -> int:
        """Pages of the text in the last step."""
        return -(-(self.prompt_tokens + len(self.pages)) // self.quest.page_size)

    def chosen(self) -> Tensor:
        """[steps, L, Hs, num_pages] bool: whether a head chose a page."""
        mask = torch.zeros(*self.pages.shape[:3], self.num_pages + 1, dtype=torch.bool)
        places = self.pages.long() % (self.num_pages + 1)  # the last column takes the padding
        return mask.scatter_(-1, places, True)[..., :-1]

    def by_layer(self) -> list[dict]:
        """A dict for each of `layers`; "by head": a list over query heads, but for pages one over the Hs that choose.

        missed_mass: mean over steps, and over heads. output_error: |out - exact| / |exact|, both norms over the steps,
        and over heads. *_of_steps: the 10th and the 90th percentile over the steps, heads taken together.
        distinct_pages: how many different pages were chosen in any step; of a layer, the mean over heads.
        """
        missed, error = self.missed.mean(0), relative_error(self.error, self.norm, 0)
        missed_range = percentiles(self.missed.mean(-1))
        error_range = percentiles(relative_error(self.error, self.norm, -1))
        layer_error = relative_error(self.error, self.norm, (0, 2))
        distinct = self.chosen().any(0).sum(-1)
        return [
            {
                "layer": layer,
                "missed_mass": rounded(missed[i].mean()),
                "missed_mass_of_steps": rounded(missed_range[i]),
                "missed_mass_by_head": rounded(missed[i]),
                "output_error": rounded(layer_error[i]),
                "output_error_of_steps": rounded(error_range[i]),
                "output_error_by_head": rounded(error[i]),
                "distinct_pages": rounded(distinct[i].double().mean()),
                "distinct_pages_by_head": distinct[i].tolist(),
            }
            for i, layer in enumerate(self.layers)
        ]


def percentiles(values: Tensor) -> Tensor:
    """The 10th and the 90th percentile of each column: [X, L] to [L, 2]."""
    return values.quantile(torch.tensor([0.1, 0.9], dtype=values.dtype), dim=0).T


class Probe(Step):
    """For a decoder, one sequence a step: attends to the pages that Quest chooses, and notes them and what they miss.

    pages: [Hs, K] of each step and layer, in the order in which they ran. terms: [3, Hq] of each, as of `compare`.
    """

    def __init__(self, attention: QuestAttention):
        super().__init__(attention)
        self.pages: list[Tensor] = []
        self.terms: list[Tensor] = []

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.append(layer, key, value)
        exact, exact_lse = self.exact(layer, query)
        if layer in self.config.dense_layers:
            return exact
        page_ids, page_counts = self.choose(layer, query)
        out, lse = self.listed(layer, query, page_ids, page_counts)
        self.pages.append(page_ids[0])
        self.terms.append(compare(out, lse, exact, exact_lse)[:, 0])
        return out


@torch.inference_mode()
def inspect_prompt(
    model: Llama,
    prompt: list[int],
    quest: QuestConfig,
    steps: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:
    """Reads a prompt with dense attention, and then decodes greedily with Quest, noting what it chooses.

    prompt: token ids, at least `quest.token_budget` of them, so that every step has pages to choose: Quest does so in
    each, also where dense attention is faster (`quest.dense_below` is not looked at).
    steps: decode steps, whatever end tokens they write.
    progress("prefill" | "decode", done, total) counts prompt tokens, and steps.

    Raises ValueError, before anything runs, for a prompt that the budget holds, for more tokens than the model has
    positions, and where all layers are dense; TypeError or ValueError for steps that are no int of at least 1.
    """
    config = model.config
    check_int("steps", steps, 1)
    layers = [layer for layer in range(config.num_hidden_layers) if layer not in quest.dense_layers]
    if not layers:
        raise ValueError(f"quest.dense_layers {quest.dense_layers} are all layers of the model: none uses Quest")
    if len(prompt) < quest.token_budget:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, which the token budget of {quest.token_budget} holds: Quest has no "
            f"pages to choose. Take a prompt of at least {quest.token_budget} tokens, or a smaller budget"
        )
    total = len(prompt) + steps
    if total > config.max_position_embeddings:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, and with {steps} new ones {total}; this model has "
            f"{config.max_position_embeddings} positions"
        )
    cache = model.new_cache(quest, -(-total // quest.block_size))
    attention = QuestAttention(
        replace(quest, dense_below=0), cache, config.num_attention_heads, max_batch_size=1, max_sequence_tokens=total
    )
    seq, text = cache.add(), torch.tensor(prompt, device=model.device)
    for start in range(0, len(prompt), PREFILL_CHUNK):
        chunk = text[start : start + PREFILL_CHUNK]
        attention.plan([seq], len(chunk), prefill=True)
        logits = model(chunk, attention.positions, attention, last=torch.tensor([len(chunk) - 1], device=model.device))
        if progress is not None:
            progress("prefill", start + len(chunk), len(prompt))
    probe, tokens = Probe(attention), [logits.argmax(-1)]
    for step in range(steps):
        attention.plan([seq], 1)
        tokens.append(model(tokens[-1], attention.positions, probe).argmax(-1))
        if progress is not None:
            progress("decode", step + 1, steps)
    pages, terms = (torch.stack(noted).unflatten(0, (steps, -1)).cpu() for noted in (probe.pages, probe.terms))
    error, norm, kept = terms.unbind(2)  # [steps, L, Hq]
    return Inspection(
        quest=quest,
        prompt_tokens=len(prompt),
        tokens=torch.cat(tokens).tolist(),
        layers=layers,
        pages=pages,
        missed=(1 - kept).clamp_min(0),  # the two sums differ in rounding
        error=error,
        norm=norm,
    )
