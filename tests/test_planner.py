"""The launch planner, a pure function of shapes and chip: grids that fill the chip and never exceed the work."""

import pytest

_C = pytest.importorskip("quest_ops._C", reason="the pybind11 module quest_ops._C was not built")

H100 = {"capability": 90, "num_sms": 132}
A100 = {"capability": 80, "num_sms": 108}
WARPS_A_BLOCK, MAX_SPLITS = 4, 128


@pytest.mark.parametrize(
    ("chip", "items", "tiles", "head_dim", "splits"),
    [
        (H100, 1, 1, 128, 1),  # one tile cannot be split
        (H100, 1, 4, 128, 1),  # a tile for each warp of a block: a second block would have none
        (H100, 1, 2048, 128, 103),  # 32K tokens, one head: five tiles a warp, and a merge that reads 103 parts
        (H100, 1, 65536, 128, MAX_SPLITS),  # 1M tokens: the merge reads no more
        (H100, 32, 2048, 128, 12),  # 32 heads: all 384 blocks resident at once (3 an SM)
        (H100, 8, 128, 256, 32),  # 2,048 tokens: one tile a warp
        (H100, 396, 64, 128, 1),  # the chip is full without splitting
        (A100, 32, 128, 128, 8),
    ],
)
def test_attention_splits(chip, items, tiles, head_dim, splits):
    assert _C.plan_attention_splits(**chip, items=items, tiles=tiles, head_dim=head_dim) == splits


@pytest.mark.parametrize("chip", [H100, A100])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("items", [1, 3, 64, 5000, 10**7])
def test_no_block_of_attention_is_without_a_tile(chip, head_dim, items):
    for tiles in (0, 1, 5, 63, 64, 1000, 62_500):  # the last: a row of 1M tokens
        splits = _C.plan_attention_splits(**chip, items=items, tiles=tiles, head_dim=head_dim)
        assert 1 <= splits <= max(1, min(MAX_SPLITS, -(-tiles // WARPS_A_BLOCK)))


def test_more_tokens_are_shared_by_more_blocks():
    splits = [_C.plan_attention_splits(**H100, items=8, tiles=2**n, head_dim=128) for n in range(1, 16)]
    assert splits == sorted(splits) and splits[0] == 1 and splits[-1] > 16


@pytest.mark.parametrize(
    ("chip", "items", "max_pages", "pages_per_block", "blocks"),
    [
        (H100, 1, 1, 4, 1),
        (H100, 1, 4096, 4, 1024),  # all the blocks that have pages
        (H100, 1, 100_000, 4, 2112),  # twice 8 blocks on 132 SMs: then each block walks
        (H100, 32, 4096, 4, 66),
        (H100, 10**6, 4096, 4, 1),
        (H100, 1, 0, 4, 1),  # an empty block table still is a valid grid
        (A100, 3, 250, 4, 63),
    ],
)
def test_walking_blocks(chip, items, max_pages, pages_per_block, blocks):
    planned = _C.plan_walking_blocks(**chip, items=items, max_pages=max_pages, pages_per_block=pages_per_block)
    assert planned == blocks


@pytest.mark.parametrize(("capability", "overlaps"), [(80, False), (86, False), (89, False), (90, True), (120, True)])
def test_launches_overlap_from_sm_90(capability, overlaps):
    assert _C.overlaps_launches(capability=capability) is overlaps
