"""The launch planner, a pure function of shapes and chip: grids that fill the chip and never exceed the work."""

import pytest

_C = pytest.importorskip("quest_ops._C", reason="the pybind11 module quest_ops._C was not built")

H100 = {"capability": 90, "num_sms": 132}
A100 = {"capability": 80, "num_sms": 108}
H200_SLICE = {"capability": 90, "num_sms": 60}  # of a partitioned GPU: fewer SMs
B200 = {"capability": 100, "num_sms": 148}
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
    assert _C.plan_attention_splits(**chip, items=items, tiles=tiles, head_dim=head_dim, ragged=False) == splits


@pytest.mark.parametrize(
    ("items", "tiles", "splits"),
    [
        (256, 4096, 10),  # 32 rows and 8 KV heads, up to 64K tokens: six blocks for each of 396 places
        (256, 640, 10),  # 16 tiles for each of 40 warps
        (256, 639, 3),  # fewer: as if rows were alike
        (64, 2432, 38),
        (64, 2048, 6),
        (10**6, 64, 1),  # the grid is long enough
    ],
)
def test_rows_of_unlike_lengths_are_split_finer(items, tiles, splits):
    sizes = {"items": items, "tiles": tiles, "head_dim": 128}
    assert _C.plan_attention_splits(**H100, **sizes, ragged=True) == splits
    assert _C.plan_attention_splits(**H100, **sizes, ragged=False) <= splits


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("chip", [H100, A100])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("items", [1, 3, 64, 5000, 10**7])
def test_no_block_of_attention_is_without_a_tile(chip, head_dim, items, ragged):
    for tiles in (0, 1, 5, 63, 64, 1000, 62_500):  # the last: a row of 1M tokens
        splits = _C.plan_attention_splits(**chip, items=items, tiles=tiles, head_dim=head_dim, ragged=ragged)
        assert 1 <= splits <= max(1, min(MAX_SPLITS, -(-tiles // WARPS_A_BLOCK)))


def test_more_tokens_are_shared_by_more_blocks():
    sizes = {"items": 8, "head_dim": 128, "ragged": False}
    splits = [_C.plan_attention_splits(**H100, **sizes, tiles=2**n) for n in range(1, 16)]
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


@pytest.mark.parametrize(
    ("chip", "teams", "head_dim", "team_size"),
    [
        (H100, 1, 128, 16),  # the largest team there is
        (H100, 8, 128, 16),  # GQA, batch 1: 128 blocks, one an SM
        (H100, 8, 256, 16),
        (H100, 9, 128, 8),  # 144 blocks of teams of 16 would be two on some SMs
        (H100, 16, 128, 8),
        (H100, 17, 128, 8),  # teams of 4 would have an SM a block, so two an SM
        (H100, 32, 128, 8),  # MHA, batch 1
        (H100, 33, 128, 8),
        (H100, 34, 128, 4),
        (H100, 64, 64, 4),
        (H100, 66, 128, 4),  # 264 blocks: as many as are resident
        (H100, 67, 128, 2),
        (H100, 132, 128, 2),
        (H100, 33, 256, 4),
        (H100, 34, 256, 2),  # D of 256: never two an SM
        (H100, 66, 256, 2),
        (H100, 0, 128, 0),  # no rows
        (H200_SLICE, 3, 128, 16),
        (H200_SLICE, 8, 128, 8),
        (H200_SLICE, 60, 128, 2),
        (B200, 9, 128, 16),
        (B200, 37, 128, 8),
        (A100, 8, 128, 0),
    ],
)
@pytest.mark.parametrize("max_pages", [0, 2048])  # 0: dense attention
def test_team_of_one_launch(chip, teams, head_dim, team_size, max_pages):
    assert _C.plan_team(**chip, teams=teams, group=4, head_dim=head_dim, max_pages=max_pages) == team_size


@pytest.mark.parametrize(
    ("chip", "teams", "head_dim", "team_size"),
    [
        (H100, 133, 128, 4),  # 266 blocks of teams of two: two of them would have the chip to themselves
        (H100, 192, 128, 4),  # 768 blocks leave 24 of three times 264 places empty, 384 blocks 144 of twice 264
        (H100, 224, 128, 2),
        (H100, 256, 128, 2),
        (H100, 1000, 128, 2),
        (H100, 67, 256, 4),
        (H200_SLICE, 61, 128, 4),
        (H100, 10**10, 128, 0),  # more words than a workspace has
    ],
)
def test_more_teams_than_fit_take_turns(chip, teams, head_dim, team_size):
    shape = {"teams": teams, "group": 4, "head_dim": head_dim}
    assert _C.plan_team(**chip, **shape, max_pages=2048) == team_size
    assert _C.plan_team(**chip, **shape, max_pages=0) == 0  # nothing to select: a launch of their own merges


@pytest.mark.parametrize(
    ("max_pages", "metadata_bits", "team_size"),
    [(4096, 16, 8), (4096, 4, 8), (4097, 16, 4), (4097, 8, 4), (4097, 4, 8), (0, 16, 8)],
)
def test_blocks_of_long_rows_have_an_sm_to_themselves(max_pages, metadata_bits, team_size):
    shape = {"teams": 32, "group": 1, "head_dim": 128, "max_pages": max_pages}
    assert _C.plan_team(**H100, **shape, metadata_bits=metadata_bits) == team_size


@pytest.mark.parametrize(
    ("capability", "group", "max_pages", "team_size"),
    [
        (90, 1, 1, 16),
        (90, 8, 0, 16),
        (90, 8, 4097, 16),  # blocks exchange shortlists
        (90, 8, 2**17, 16),
        (120, 8, 2**17, 16),
        (90, 8, 2**17 + 1, 0),
        (90, 9, 2048, 0),  # more query heads than columns of an mma
        (90, 9, 0, 0),
        (89, 8, 2048, 0),
        (89, 8, 0, 0),
        (80, 8, 2048, 0),
    ],
)
def test_which_steps_take_one_launch(capability, group, max_pages, team_size):
    shape = {"teams": 8, "group": group, "head_dim": 128, "max_pages": max_pages}
    assert _C.plan_team(capability=capability, num_sms=132, **shape) == team_size


@pytest.mark.parametrize(
    ("teams", "group", "head_dim", "max_pages", "team_size"),
    [
        # Words of a team of 2: flags 16, parts 2 * 2 * group * D, shortlists 128 + 4096 above 4096 pages, keys.
        (132, 4, 128, 57_260, 2),  # 132 * (16 + 2048 + 4224 + 57260) * 4 = 33,553,344 of 33,554,432 bytes
        (132, 4, 128, 57_261, 0),  # keys are padded to 57,264
        (132, 8, 128, 55_212, 2),
        (132, 8, 128, 55_213, 0),
        (132, 8, 128, 0, 2),  # dense attention meets for its output alone
        (132, 8, 64, 57_261, 0),
        (66, 8, 128, 65_536, 4),  # 66 * (16 + 8192 + 4224 + 65536) * 4 = 20,583,552 bytes
    ],
)
def test_the_workspace_bounds_one_launch(teams, group, head_dim, max_pages, team_size):
    assert _C.plan_team(**H100, teams=teams, group=group, head_dim=head_dim, max_pages=max_pages) == team_size


@pytest.mark.parametrize("num_sms", [1, 2, 7, 60, 78, 132, 148])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("max_pages", [0, 4096])
def test_all_blocks_of_a_team_are_resident(num_sms, head_dim, max_pages):
    """Teams wait for their members: a block that cannot run beside them would never be met. And none is left idle."""
    resident = num_sms * (2 if head_dim <= 128 else 1)
    for teams in range(1, 2 * num_sms + 3):
        shape = {"teams": teams, "group": 8, "head_dim": head_dim, "max_pages": max_pages}
        size = _C.plan_team(capability=90, num_sms=num_sms, **shape)
        if teams * 2 > resident:  # they take turns
            assert size == 0 if max_pages == 0 or resident < 4 else size in (2, 4)
            continue
        assert size in (2, 4, 8, 16)
        assert teams * size <= resident
        if teams * 8 <= num_sms:  # a block an SM
            assert size >= 8 and teams * size <= num_sms and (size == 16 or 2 * teams * size > num_sms)
        else:
            assert size <= 8 and teams * max(2 * size, 2) > resident


@pytest.mark.parametrize(
    ("blocks", "head_dim", "gang"),
    [
        (132, 128, True),  # the next launch's blocks find room beside
        (133, 128, False),
        (264, 128, False),
        (132, 256, False),  # D of 256: one an SM
        (66, 256, True),
        (67, 256, False),
    ],
)
def test_which_launches_start_as_one(blocks, head_dim, gang):
    assert _C.starts_as_gang(**H100, blocks=blocks, head_dim=head_dim) is gang


@pytest.mark.parametrize(("capability", "overlaps"), [(80, False), (86, False), (89, False), (90, True), (120, True)])
def test_launches_overlap_from_sm_90(capability, overlaps):
    assert _C.overlaps_launches(capability=capability) is overlaps


@pytest.mark.parametrize(
    ("blocks", "head_dim", "items", "spare"),
    [
        (128, 128, 8, 4),  # a block for every SM
        (128, 128, 0, 4),
        (128, 128, 64, 8),  # a warp for each token and KV head
        (132, 128, 8, 1),
        (132, 128, 0, 0),
        (256, 128, 64, 8),
        (256, 128, 1000, 8),  # as many as fit beside the teams: a warp takes several
        (264, 128, 66, 9),  # none does: they come last
        (1000, 128, 400, 50),
        (64, 256, 64, 68),
        (128, 256, 64, 4),  # D of 256: one an SM
        (132, 256, 33, 5),
    ],
)
def test_blocks_that_append(blocks, head_dim, items, spare):
    planned = _C.plan_spare_blocks(**H100, blocks=blocks, head_dim=head_dim, items=items)
    assert planned == spare
