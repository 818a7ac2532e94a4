"""Queries, keys and values of a decoder on real texts, and pools that hold them instead of random numbers."""

from dataclasses import dataclass

import torch
from cases import Case, Layers
from torch import Tensor

from quest_ops.dense import causal_attention
from quest_ops.llama.model import Llama

QUERY_STRIDE = 13  # tokens between a document's recorded queries: they are the last ones of pages as well as others


@dataclass(frozen=True)
class Recording:
    """What a layer's attention was given of a document, after RoPE.

    keys, values [N, Hkv, D], of all tokens. queries [Q, Hq, D]: number b is that of token `N - 1 - b * QUERY_STRIDE`.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor


class Recorder:
    """For a decoder: causal attention to one document, given whole, that records some layers."""

    def __init__(self, layers: list[int], queries: int, dtype: torch.dtype):
        self.layers, self.dtype = layers, dtype
        self.rows = [-1 - b * QUERY_STRIDE for b in range(queries)]
        self.recordings: dict[int, Recording] = {}

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if layer in self.layers:
            # Copies: what is given are slices of larger tensors.
            kept = (x.to(self.dtype, copy=True).contiguous() for x in (key, value, query[self.rows]))
            self.recordings[layer] = Recording(*kept)
        return causal_attention(query, key.transpose(0, 1), value.transpose(0, 1), query.size(-1) ** -0.5)


@torch.inference_mode()
def recordings_of(
    model: Llama, documents: list[list[int]], layers: list[int], queries: int, dtype: torch.dtype
) -> list[list[Recording]]:
    """Of each of `layers` those of all documents. queries: of a document; dtype: of what is kept."""
    found = []
    for document in documents:
        recorder, tokens = Recorder(layers, queries, dtype), torch.tensor(document, device=model.device)
        model(tokens, torch.arange(len(tokens), device=model.device), recorder, last=tokens.new_zeros(1))
        found.append(recorder.recordings)
    return [[of_document[layer] for of_document in found] for layer in layers]


def context_before(documents: list[Recording], last: int, tokens: int, query: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the context of recorded query number `query` of document `last`, its own token at their end.

    In full the context has `tokens` tokens, at least a document's: the document, before it the one before it and so on,
    in a circle, and the beginning of a last one, so that it begins as texts do. From it as many are missing at the end
    as the query comes before its document's last token.
    """
    pieces, space = [], tokens
    while space:
        document = documents[last % len(documents)]
        pieces.append((document.keys[:space], document.values[:space]))
        space -= len(pieces[-1][0])
        last -= 1
    keys, values = (torch.cat(parts[::-1])[: tokens - query * QUERY_STRIDE] for parts in zip(*pieces))
    return keys, values


def lengths_of(tokens: int, batch: int) -> tuple[int, ...]:
    """Of the contexts of the recorded queries 0 to batch - 1."""
    return tuple(tokens - b * QUERY_STRIDE for b in range(batch))


class RecordedLayers(Layers):
    """Pools and queries out of recordings; the case's lengths are `lengths_of(case.context, batch)`.

    Request b has query number b. The pools take the recorded layers in turn, and each of their requests another
    document to end with, so no two requests of a pool and no two pools of a recorded layer, one after the other, see
    the same tokens at the same places.
    """

    def __init__(self, case: Case, device: str, recordings: list[list[Recording]]):
        super().__init__(case, device)
        places = []
        for table, length in zip(self.table.long(), case.lengths):
            token = torch.arange(length, device=device)
            places.append((table[token // case.block_size], token % case.block_size))
        for i in range(self.count):
            turn, layer = divmod(i, len(recordings))
            documents = recordings[layer]
            for b, place in enumerate(places):
                last = turn + b
                self.k[i][place], self.v[i][place] = context_before(documents, last, case.context, b)
                self.queries[i][b] = documents[last % len(documents)].queries[b]
