import dataclasses

import pytest
import torch

from quest_ops.config import QuestConfig


def test_lengths_become_whole_pages():
    config = QuestConfig(page_size=32, token_budget=1000, sink_tokens=1, recent_tokens=33)
    assert (config.page_budget, config.sink_pages, config.recent_pages) == (31, 1, 2)
    assert QuestConfig(sink_tokens=0).sink_pages == 0


def test_defaults_are_those_of_the_design():
    config = QuestConfig()
    assert (config.page_budget, config.sink_pages, config.recent_pages) == (128, 1, 4)
    assert (config.head_reduction, config.dense_layers, config.dense_below) == ("max", (), None)
    assert (config.bound, config.bound_scale, config.select_every) == ("minmax", 1.0, 1)


def test_paper_has_no_sink_one_recent_page_and_two_dense_layers():
    for page_size in (8, 128):
        config = QuestConfig.paper(page_size=page_size)
        assert (config.sink_pages, config.recent_pages, config.dense_layers) == (0, 1, (0, 1))
    assert QuestConfig.paper(dense_layers=()).dense_layers == ()


def test_the_smallest_budget_holds_sink_recent_and_one_page():
    assert QuestConfig(token_budget=16 * 6).page_budget == 6
    with pytest.raises(ValueError, match=r"token_budget 95 is 5 pages.*at least 96"):
        QuestConfig(token_budget=95)


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
        ({"bound": "std"}, ValueError, "bound.*minmax.*cuboid.*mean_std.*'std'"),
        ({"bound": None}, ValueError, "bound.*None"),
        ({"bound_scale": 1.5}, ValueError, "bound_scale.*minmax.*1.5"),
        ({"bound": "cuboid", "bound_scale": 0}, ValueError, "bound_scale.*0"),
        ({"bound": "cuboid", "bound_scale": -1.0}, ValueError, "bound_scale.*-1"),
        ({"bound": "mean_std", "bound_scale": float("nan")}, ValueError, "bound_scale.*nan"),
        ({"bound": "mean_std", "bound_scale": 1e39}, ValueError, "bound_scale.*1e"),
        ({"bound": "mean_std", "bound_scale": "1"}, TypeError, "bound_scale.*'1'"),
        ({"bound": "mean_std", "bound_scale": True}, TypeError, "bound_scale.*True"),
        ({"select_every": 0}, ValueError, "select_every.*0"),
        ({"select_every": 17}, ValueError, "select_every must be 1 to page_size = 16, got 17"),
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
        ({"head_budgets": ((256, 95),)}, ValueError, r"head_budgets\[0\]\[1\] is 95 tokens.*at least 96"),
        ({"head_budgets": ((256, 257),)}, ValueError, "token_budget must be the mean of head_budgets, 256, got 2048"),
    ],
)
def test_bad_settings_are_named(settings, error, named):
    with pytest.raises(error, match=named):
        QuestConfig(**settings)


def test_metadata_may_have_the_dtype_of_a_cache_or_8_bits():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn):
        assert QuestConfig(metadata_dtype=dtype).metadata_dtype == dtype


def test_a_ratio_lets_the_budget_grow_in_whole_pages_and_never_shrinks_it():
    config = QuestConfig(token_budget=256, budget_ratio=0.25)
    assert [config.row_page_budget(n) for n in (0, 100, 1024, 1087, 1088, 2**20)] == [16, 16, 16, 16, 17, 2**14]
    assert QuestConfig(token_budget=256).row_page_budget(2**20) == 16


def test_budgets_of_heads_become_whole_pages():
    config = QuestConfig(token_budget=256, head_budgets=[[128, 384], [111, 401]])
    assert config.head_budgets == ((128, 384), (111, 401)) and hash(config)
    assert config.head_page_budgets == ((8, 24), (6, 25))
    assert QuestConfig().head_page_budgets is None
