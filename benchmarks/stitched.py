"""Contexts longer than a model's, of its own queries, keys and values: recorded documents at the places of one text."""

from dataclasses import dataclass

import torch
from longer import longer_config
from recordings import QUERY_STRIDE, Recording
from torch import Tensor

from quest_ops.llama.config import LlamaConfig
from quest_ops.llama.rope import rope_frequencies, rotate

BEGINNING = 16  # tokens of a document; the first one is where attention that finds nothing goes


@dataclass(frozen=True)
class Place:
    """Of a document the tokens [start, start + size) in a context from `at` on."""

    document: int
    start: int
    size: int
    at: int


def places_of(sizes: list[int], last: int, context: int) -> list[Place]:
    """Where the documents of so many tokens each lie in a context that document `last` ends, in order.

    Before it come the one before it and so on, in a circle. All but the first are without their beginning: a text has
    one. The first is cut off at the end.
    """
    places, space = [], context
    while space:
        document = last % len(sizes)
        start = 0 if sizes[document] >= space else BEGINNING
        size = min(space, sizes[document] - start)
        space -= size
        places.append(Place(document, start, size, at=space))
        last -= 1
    return places[::-1]


class Stitch:
    """The places of the documents in a context and what turns their keys from the rotations of their own positions to
    those of the places: keys and queries are what the model makes of a text as long as it was trained for, and meet at
    the distances of the context.

    config: of the model. method: of longer.py, where the context has more than the model's positions.
    """

    def __init__(
        self, config: LlamaConfig, method: str, sizes: list[int], last: int, context: int, queries: int, device
    ):
        self.places, self.last, self.context = places_of(sizes, last, context), last % len(sizes), context
        positions = config.max_position_embeddings
        longer = longer_config(config, method, context / positions) if context > positions else config
        self._own, self._theirs = rope_frequencies(config), rope_frequencies(longer)
        before = torch.cat([torch.arange(p.start, p.start + p.size) for p in self.places])
        self._of_keys = self._turn(before, torch.arange(context), device)
        back = torch.arange(queries) * QUERY_STRIDE + 1
        self._of_queries = self._turn(sizes[self.last] - back, context - back, device)
        self.seq_lens = (context - back + 1).int().to(device)

    def _turn(self, before: Tensor, after: Tensor, device) -> tuple[Tensor, Tensor]:
        """cos and sin for `rotate`, from positions before to those after, [N] each."""
        (own, own_factor), (theirs, factor) = self._own, self._theirs
        angles = (after[:, None, None] * theirs.double() - before[:, None, None] * own.double()).to(device)
        cos, sin = (x.float() * (factor / own_factor) for x in (angles.cos(), angles.sin()))
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def of(self, documents: list[Recording]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [Q, Hq, D], keys and values [context, Hkv, D] of a layer. Query b is that of token
        `context - 1 - b * QUERY_STRIDE` and sees the first seq_lens[b] tokens."""
        parts = [(documents[p.document], slice(p.start, p.start + p.size)) for p in self.places]
        keys = rotate(torch.cat([document.keys[part] for document, part in parts]), *self._of_keys)
        values = torch.cat([document.values[part] for document, part in parts])
        return rotate(documents[self.last].queries, *self._of_queries), keys, values
