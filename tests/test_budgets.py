"""Budgets other than one fixed number: by a row's length, by layer and head: plan's tensors and what run attends to."""

import pytest
import torch
from cases import OUT_TOLERANCE
from test_dense_length import tokens_of
from test_layer import HEADS, KV_HEADS, LAYERS, PAGE, make_attention, make_cache, make_config

from quest_ops import reference

MEAN = 8
HEAD_PAGES = ((5, 11), (3, 13))  # of LAYERS and KV_HEADS; 8 on average
BY_HEAD = {"token_budget": MEAN * PAGE, "head_budgets": tuple(tuple(PAGE * n for n in heads) for heads in HEAD_PAGES)}


def prefill(attention, lengths):
    """Sequences of these lengths, the same keys in all layers."""
    seqs = [attention.cache.add() for _ in lengths]
    for seq, length in zip(seqs, lengths):
        attention.plan([seq], length, prefill=True)
        for layer in range(LAYERS):
            attention.run(layer, *tokens_of(length, attention.cache.device))
    return seqs


def assert_attends_as_the_twin(attention, budgets, inputs):
    """The planned step in each layer, with budgets [layers, rows, heads] in pages."""
    cache, config = attention.cache, attention.config
    requests = attention.request_table.cpu()
    for layer in range(LAYERS):
        out = attention.run(layer, *inputs)
        tensors = [x.cpu() for x in (cache.k_cache(layer), cache.v_cache(layer), cache.page_metadata(layer))]
        expected, _ = reference.quest_decode_attention(
            inputs[0].cpu(), *tensors, requests, attention.seq_lens.cpu(), 40, config.sink_pages, config.recent_pages,
            config.head_reduction, bound=config.bound, page_budgets=torch.tensor(budgets[layer], dtype=torch.int32),
        )  # fmt: skip
        tolerance = OUT_TOLERANCE[torch.float16]
        torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_ratio_gives_each_row_pages_by_its_length(device, rows):
    config = make_config(budget_ratio=0.25)  # or 4 pages
    attention = make_attention(make_cache(device, num_blocks=128), config)
    short, middle, long = prefill(attention, [20, 135, 255])
    attention.plan([middle, short, long], rows)
    lengths = [n + t for n in (135, 20, 255) for t in range(1, rows + 1)]
    budgets = [max(4, n // 4 // PAGE) for n in lengths]
    assert max(budgets) == 8 and min(budgets) == 4
    full = attention.page_budgets.max().item()  # of the rows of the short sequence
    assert attention.page_budgets.tolist() == [full if n <= 32 else b for n, b in zip(lengths, budgets)]
    if device == "cpu":
        assert attention.budgets_of(0)[0] == full == 10  # of 40 pages, the longest sequence
    heads = [[[b] * KV_HEADS for b in budgets]] * LAYERS
    assert_attends_as_the_twin(attention, heads, tokens_of(3 * rows, device))


@pytest.mark.parametrize("head_reduction", ["max", "none"])
@pytest.mark.parametrize("ratio", [None, 0.5])
def test_each_layer_and_head_gets_its_pages(device, head_reduction, ratio):
    config = make_config(**BY_HEAD, head_reduction=head_reduction, budget_ratio=ratio)
    attention = make_attention(make_cache(device, num_blocks=128), config)
    seqs = prefill(attention, [62, 90, 199])  # 8, 12 and 25 pages with one more token
    of_row = [40, 8, 8] if ratio is None else [40, 8, 12]
    group = 1 if head_reduction == "max" else HEADS // KV_HEADS
    budgets = [
        [[n * of_row[r] // MEAN if r else 40 for n in heads for _ in range(group)] for r in range(3)]
        for heads in HEAD_PAGES
    ]
    attention.plan(seqs, 1)
    most = attention.budgets_of(0)[0]
    assert attention.head_page_budgets.dtype == torch.int32
    assert attention.head_page_budgets.tolist() == [[[min(n, most) for n in row] for row in x] for x in budgets]
    assert_attends_as_the_twin(attention, budgets, tokens_of(3, device))


def test_a_head_whose_budget_covers_the_row_attends_to_all_of_it(device):
    dense, quest = (
        make_attention(make_cache(device, num_blocks=128), make_config(**BY_HEAD), backend=backend)
        for backend in ("dense", "quest")
    )
    for attention in (dense, quest):
        attention.plan(prefill(attention, [100]), 1)  # 13 pages
    inputs = tokens_of(1, device)
    for layer in range(LAYERS):
        full, out = (attention.run(layer, *inputs).view(KV_HEADS, -1) for attention in (dense, quest))
        error = (full - out).abs().amax(1)
        for head, pages in enumerate(HEAD_PAGES[layer]):
            assert (error[head] < OUT_TOLERANCE[torch.float16]) == (pages >= 13)


def test_plan_keeps_the_budgets_of_heads_where_they_are(device):
    attention = make_attention(make_cache(device, num_blocks=128), make_config(**BY_HEAD))
    a, b, c = prefill(attention, [70, 80, 20])
    addresses = set()
    for seqs, rows in (([a, b], 1), ([a, None, b], 1), ([b, c], 3), ([a], 2)):
        attention.plan(seqs, rows)
        kept = attention.head_page_budgets
        assert kept.shape == (LAYERS, len(seqs) * rows, KV_HEADS)
        assert kept[1, 0].tolist() == [3, 13] and attention.budgets_of(1)[1].is_contiguous()
        addresses.add(tuple(kept[layer].data_ptr() for layer in range(LAYERS)))
    assert len(addresses) == 1


def test_budgets_of_heads_must_be_of_the_caches_shape():
    with pytest.raises(ValueError, match="head_budgets has 1 layers of 3 KV heads, the cache has 2 of 2"):
        make_attention(make_cache(), make_config(token_budget=256, head_budgets=((256,) * 3,)))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"budget_ratio": 0.25}, BY_HEAD, BY_HEAD | {"budget_ratio": 0.5}])
def test_a_captured_step_replays_while_the_budget_grows(settings):
    attention = make_attention(make_cache("cuda", num_blocks=128), make_config(**settings))
    a, b = prefill(attention, [100, 200])
    static = [x.clone() for x in tokens_of(2, "cuda")]
    graph, kinds = torch.cuda.CUDAGraph(), set()
    for step in range(40):
        attention.plan([a, b], 1)
        kinds.add(tuple(attention.page_budgets.tolist()))
        if step == 0:
            attention.run(1, *static)  # a warm-up; appending a second time changes nothing
            with torch.cuda.graph(graph):
                out = attention.run(1, *static)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, attention.run(1, *static))
    assert len(kinds) >= (2 if "budget_ratio" in settings else 1)
