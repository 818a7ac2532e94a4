import dataclasses

import pytest
import torch

from quest_ops import PagedKVCache, QuestAttention
from quest_ops.config import PAGE_SIZES, QuestConfig


def test_lengths_become_whole_pages():
    config = QuestConfig(page_size=32, token_budget=1000, sink_tokens=1, recent_tokens=33)
    assert (config.page_budget, config.sink_pages, config.recent_pages) == (31, 1, 2)
    assert QuestConfig(sink_tokens=0).sink_pages == 0


def test_defaults_are_what_the_tables_chose():
    config = QuestConfig()
    assert (config.page_size, config.metadata_dtype) == (8, torch.uint8)
    assert (config.bound, config.bound_scale, config.select_every) == ("principal", 1.0, 1)
    assert (config.token_budget, config.sink_tokens, config.recent_tokens) == (2048, 16, 64)
    assert (config.page_budget, config.sink_pages, config.recent_pages) == (256, 2, 8)
    assert (config.head_reduction, config.dense_layers, config.dense_below) == ("max", (), None)


def test_the_defaults_of_config_and_cache_fit_each_other():
    """As many bytes of metadata as the paper's, in blocks of 16 tokens."""
    cache, config = PagedKVCache(1, 1, 64, 4), QuestConfig()
    QuestAttention(config, cache, 1, max_batch_size=1, max_sequence_tokens=64)
    assert cache.block_size == config.block_size == 16 and cache.metadata_dtype == config.metadata_dtype
    papers = PagedKVCache(1, 1, 64, 4, page_size=16, pages_per_block=1, metadata_dtype=None)
    QuestAttention(QuestConfig.paper(dense_layers=()), papers, 1, max_batch_size=1, max_sequence_tokens=64)
    assert papers.metadata_bytes == papers.kv_bytes / 16 == cache.metadata_bytes * 16 / 9


def test_blocks_have_16_tokens_or_one_page():
    assert [QuestConfig(page_size=n).block_size for n in PAGE_SIZES] == [16, 16, 16, 32, 64, 128]


def test_paper_is_as_the_paper_says():
    config = QuestConfig.paper()
    assert (config.page_size, config.bound, config.bound_scale, config.metadata_dtype) == (16, "minmax", 1.0, None)
    assert (config.sink_pages, config.recent_pages, config.dense_layers) == (0, 1, (0, 1))
    assert (config.token_budget, config.head_reduction, config.select_every) == (2048, "max", 1)
    for page_size in (8, 128):
        config = QuestConfig.paper(page_size=page_size)
        assert (config.sink_pages, config.recent_pages, config.dense_layers) == (0, 1, (0, 1))
    assert QuestConfig.paper(dense_layers=()).dense_layers == ()


@pytest.mark.parametrize(
    ("tokens", "budget", "page_size", "token_budget"),
    [
        (1, 2048, 4, 2048),
        (2048, 256, 4, 240),
        (6656, 512, 4, 460),
        (16384, 2048, 4, 1920),  # 8 budgets
        (16384, 1024, 4, 896),  # 16
        (16385, 2048, 8, 2048),
        (16385, 1025, 8, 1025),  # less than 16, but many tokens
        (4097, 256, 16, 328),
        (32768, 2048, 8, 2048),
        (32769, 2048, 16, 2624),
        (131072, 2048, 16, 4352),  # 64
        (131073, 2048, 32, 5504),
        (131072, 512, 32, 3968),
        (2**20, 2048, 32, 29696),
    ],
)
def test_pages_grow_with_the_context_and_budgets_fit_their_metadata(tokens, budget, page_size, token_budget):
    config = QuestConfig.for_context(tokens, budget, recent_tokens=128)
    assert (config.page_size, config.token_budget, config.recent_tokens) == (page_size, token_budget, 128)
    assert (config.bound, config.metadata_dtype) == ("principal", torch.uint8)
    read = config.token_budget + tokens / page_size * 9 / 32  # in tokens' K and V of 16 bits
    allowed = tokens / 16 if page_size == 4 else tokens / 8 * 9 / 32  # the paper's, or that of pages of 8
    assert abs(read - (budget + allowed)) <= 1


def test_a_budget_without_room_for_smaller_pages_keeps_those_of_8():
    config = QuestConfig.for_context(512, 255)
    assert (config.page_size, config.token_budget) == (8, 255)


def test_for_context_takes_no_page_size():
    for name, value in (("page_size", 8), ("metadata_dtype", None)):
        with pytest.raises(TypeError, match=f"for_context chooses {name}, got"):
            QuestConfig.for_context(1024, **{name: value})
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        QuestConfig.for_context(0)


def test_the_smallest_budget_holds_sink_recent_and_one_page():
    assert QuestConfig(token_budget=8 * 11).page_budget == 11
    with pytest.raises(ValueError, match=r"token_budget 87 is 10 pages.*at least 88"):
        QuestConfig(token_budget=87)


def test_a_config_is_frozen_and_hashable():
    config = QuestConfig(dense_layers=[0, 3])
    assert config.dense_layers == (0, 3) and hash(config) == hash(QuestConfig(dense_layers=(0, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 32


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"page_size": 24}, ValueError, "page_size.*24"),
        ({"page_size": 0}, ValueError, "page_size"),
        ({"page_size": "16"}, TypeError, "page_size.*'16'"),
        ({"token_budget": 0}, ValueError, "token_budget"),
        ({"token_budget": 512.0}, TypeError, "token_budget"),
        ({"token_budget": True}, TypeError, "token_budget"),
        ({"token_budget": 2**31}, ValueError, "token_budget.*int32"),
        ({"sink_tokens": -1}, ValueError, "sink_tokens.*-1"),
        ({"recent_tokens": 0}, ValueError, "recent_tokens.*0"),
        ({"dense_below": -1}, ValueError, "dense_below.*-1"),
        ({"dense_layers": 2}, TypeError, "dense_layers.*2"),
        ({"dense_layers": (-1,)}, ValueError, "dense_layers.*-1"),
        ({"dense_layers": ("0",)}, TypeError, "dense_layers.*'0'"),
        ({"head_reduction": "sum"}, ValueError, "head_reduction.*max.*'sum'"),
        ({"metadata_dtype": "bfloat16"}, TypeError, "metadata_dtype.*'bfloat16'"),
        ({"metadata_dtype": torch.float8_e5m2}, ValueError, "metadata_dtype.*float8_e4m3fn.*float8_e5m2"),
        ({"metadata_dtype": torch.int8}, ValueError, "metadata_dtype.*int8"),
        ({"bound": "std"}, ValueError, "bound.*minmax.*cuboid.*mean_std.*principal.*'std'"),
        ({"bound": None}, ValueError, "bound.*None"),
        ({"bound": "minmax", "bound_scale": 1.5}, ValueError, "bound_scale.*minmax.*1.5"),
        ({"bound": "cuboid", "bound_scale": 0}, ValueError, "bound_scale.*0"),
        ({"bound": "cuboid", "bound_scale": -1.0}, ValueError, "bound_scale.*-1"),
        ({"bound": "mean_std", "bound_scale": float("nan")}, ValueError, "bound_scale.*nan"),
        ({"bound": "mean_std", "bound_scale": 1e39}, ValueError, "bound_scale.*1e"),
        ({"bound": "mean_std", "bound_scale": "1"}, TypeError, "bound_scale.*'1'"),
        ({"bound": "mean_std", "bound_scale": True}, TypeError, "bound_scale.*True"),
        ({"select_every": 0}, ValueError, "select_every.*0"),
        ({"select_every": 9}, ValueError, "select_every must be 1 to page_size = 8, got 9"),
        ({"select_every": 2.0}, TypeError, "select_every.*2.0"),
        ({"select_every": True}, TypeError, "select_every.*True"),
        ({"page_budget": 3}, TypeError, "page_budget"),
        ({"budget_ratio": "0.1"}, TypeError, "budget_ratio.*'0.1'"),
        ({"budget_ratio": True}, TypeError, "budget_ratio.*True"),
        ({"budget_ratio": 0}, ValueError, "budget_ratio.*0 and 1.*got 0"),
        ({"budget_ratio": 1.0}, ValueError, "budget_ratio.*got 1.0"),
        ({"budget_ratio": float("nan")}, ValueError, "budget_ratio.*nan"),
        ({"head_budgets": 256}, TypeError, "head_budgets must be a tuple of tuples.*'256'"),
        ({"head_budgets": (256, 256)}, TypeError, "head_budgets must be a tuple of tuples"),
        ({"head_budgets": ()}, ValueError, r"head_budgets must have a layer or more.*got heads \[\]"),
        ({"head_budgets": ((256,), (256, 256))}, ValueError, r"head_budgets .*equally many.*\[1, 2\]"),
        ({"head_budgets": ((256, 256.0),)}, TypeError, r"head_budgets\[0\]\[1\].*256.0"),
        ({"head_budgets": ((256, 2**31),)}, ValueError, r"head_budgets\[0\]\[1\] must fit int32"),
        ({"head_budgets": ((256, 87),)}, ValueError, r"head_budgets\[0\]\[1\] is 87 tokens.*at least 88"),
        ({"head_budgets": ((256, 257),)}, ValueError, "token_budget must be the mean of head_budgets, 256, got 2048"),
    ],
)
def test_bad_settings_are_named(settings, error, named):
    with pytest.raises(error, match=named):
        QuestConfig(**settings)


def test_metadata_may_have_the_dtype_of_a_cache_or_8_bits():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8):
        assert QuestConfig(metadata_dtype=dtype).metadata_dtype == dtype


def test_a_ratio_lets_the_budget_grow_in_whole_pages_and_never_shrinks_it():
    config = QuestConfig(page_size=16, token_budget=256, budget_ratio=0.25)
    assert [config.row_page_budget(n) for n in (0, 100, 1024, 1087, 1088, 2**20)] == [16, 16, 16, 16, 17, 2**14]
    assert QuestConfig(page_size=16, token_budget=256).row_page_budget(2**20) == 16


def test_budgets_of_heads_become_whole_pages():
    config = QuestConfig(page_size=16, token_budget=256, head_budgets=[[128, 384], [111, 401]])
    assert config.head_budgets == ((128, 384), (111, 401)) and hash(config)
    assert config.head_page_budgets == ((8, 24), (6, 25))
    assert QuestConfig().head_page_budgets is None
