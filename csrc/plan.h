// The launch planner: pure functions of shapes and chip, tested without a GPU. Shapes are static under a CUDA graph, so
// grids depend on them alone; kernels find the lengths on the device.
#pragma once
#include <algorithm>
#include <cstdint>

#include "host_device.h"

namespace quest {

struct Chip {
    int32_t capability;  // 90 for sm_90
    int32_t num_sms;
};

constexpr int kTileTokens = 16;  // tokens a warp attends to at once, and pages it scores at once: the rows of an mma
constexpr int kWarpsPerBlock = 4;
constexpr int kMaxSplits = 128;  // partial results a merge block reads for one head

inline int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Programmatic dependent launch exists from sm_90 on.
inline bool overlaps_launches(Chip chip) { return chip.capability >= 90; }

// Blocks that walk the pages of one of `items` (row or request, KV head) pairs, `pages_per_block` at a time: enough to
// fill the chip twice over, no more than there are pages.
inline int32_t plan_walking_blocks(Chip chip, int64_t items, int32_t max_pages, int32_t pages_per_block) {
    constexpr int kResident = 8;  // blocks of 128 threads an SM
    const int32_t most = std::max(ceil_div(max_pages, pages_per_block), 1);
    return std::clamp(ceil_div(2LL * chip.num_sms * kResident, std::max<int64_t>(items, 1)), 1, most);
}

// Blocks that share the tiles of one (row, KV head) in sparse_decode_attention. `tiles` is the most that a row can
// have. Costs are in tiles: a block's longest warp, its start, and what the merge reads. Where rows may differ much in
// length (`ragged`), many small blocks keep the chip full to the end: six for each that is resident, if that leaves a
// warp 16 tiles of the longest row.
inline int32_t plan_attention_splits(Chip chip, int64_t items, int64_t tiles, int32_t head_dim, bool ragged) {
    constexpr double kBlockStart = 2.0, kMergeStart = 2.0, kMergeSplit = 0.05;
    const int64_t resident = static_cast<int64_t>(chip.num_sms) * (head_dim <= 128 ? 3 : 2);
    int32_t best = 1;
    double best_cost = 1e30;
    const int32_t most = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(tiles, kWarpsPerBlock), 1, kMaxSplits));
    if (const int64_t many = ceil_div(6 * resident, std::max<int64_t>(items, 1));
        ragged && many <= most && many * kWarpsPerBlock * 16 <= tiles)
        return static_cast<int32_t>(many);
    for (int32_t splits = 1; splits <= most; ++splits) {
        const double waves = std::max(1.0, static_cast<double>(items * splits) / resident);
        const double longest = ceil_div(tiles, static_cast<int64_t>(splits) * kWarpsPerBlock);
        // Past one wave, blocks queue: the time is that of the waves, the last one perhaps partly empty.
        const double rounds = waves > 1.0 ? ceil_div(items * splits, resident) : 1.0;
        const double cost = rounds * (longest + kBlockStart) + (splits > 1 ? kMergeStart + kMergeSplit * splits : 0.0);
        if (cost < best_cost) {
            best_cost = cost;
            best = splits;
        }
    }
    return best;
}

// The fused decode: a team of 2^n blocks for each (row, KV head), which meet in a workspace.
constexpr int kMaxFusedPages = 1 << 17;
constexpr int kMostDirectPages = 4096;   // above, blocks exchange shortlists first
constexpr int kShortlistEntries = 2048;  // of a team
constexpr int kTeamWarps = 8;            // a block
constexpr int kMaxTeamLog2 = 4, kMaxTeam = 1 << kMaxTeamLog2;
constexpr int kMaxTeamGroup = 8;  // query heads a KV head: the columns of an mma
constexpr int64_t kWorkspaceBytes = 32 << 20;

// Words of workspace: flags, parts of the output, bounds and entries of shortlists, the keys of a team's pages.
// Multiples of 4, so that blocks move 16 bytes at once. max_pages: 0 where nothing is selected.
QUEST_HOST_DEVICE inline int32_t shortlist_words(int32_t max_pages) {
    return max_pages > kMostDirectPages ? kMaxTeam * kTeamWarps + 2 * kShortlistEntries : 0;
}
QUEST_HOST_DEVICE inline int64_t team_words(int32_t team_size, int32_t group, int32_t head_dim, int32_t max_pages) {
    return kMaxTeam + int64_t(2) * team_size * group * head_dim + shortlist_words(max_pages) + (max_pages + 3) / 4 * 4;
}

inline int64_t workspace_words(int64_t teams, int32_t team_size, int32_t group, int32_t head_dim, int32_t max_pages) {
    return teams * team_words(team_size, group, head_dim, max_pages);
}

// Blocks that are on the chip at once.
inline int64_t resident_blocks(Chip chip, int32_t head_dim) {
    return int64_t(chip.num_sms) * (head_dim <= 128 ? 2 : 1);
}

// Of teams that select and are more than fit, so that their blocks take turns: n, 1 or 2. In turns of a block of a team
// of two: one of a team of four takes half of that and 6% more, and a place that is empty in the last turn costs a
// fifth, since the others' blocks then read faster (fitted to an H100).
inline int32_t plan_teams_in_turns(int64_t teams, int64_t resident) {
    auto cost = [&](int32_t n, double turn) {
        const int64_t blocks = teams << n, places = ceil_div(blocks, resident) * resident;
        return turn * blocks + 0.2 * (places - blocks) / (1 << n) * 2;
    };
    return cost(2, 0.53) < cost(1, 1.0) ? 2 : 1;
}

// Returns n; -1: take the portable path. max_pages 0: dense attention, nothing is selected. metadata_bits: of a number.
inline int32_t plan_team(Chip chip, int64_t teams, int32_t group, int32_t head_dim, int32_t max_pages,
                         int32_t metadata_bits) {
    if (chip.capability < 90 || group > kMaxTeamGroup || teams == 0 || max_pages > kMaxFusedPages) return -1;
    const int64_t resident = resident_blocks(chip, head_dim);
    auto largest = [&](int64_t blocks) {
        int32_t n = kMaxTeamLog2;
        while (n > 0 && teams << n > blocks) --n;
        return n;
    };
    // A block an SM leaves room for the next launch's beside it, and was faster than two an SM where a team then has
    // eight or more; where the bytes of many pages set the pace, four or more (docs/experiments.md).
    const int32_t least = max_pages > kMostDirectPages && metadata_bits > 4 ? 2 : 3;
    int32_t n = largest(chip.num_sms);
    if (n < least) n = largest(resident);
    if (n == 0) {
        // Where nothing is selected, blocks that meet for the output alone are slower than a launch that merges.
        if (max_pages == 0 || resident < 4) return -1;
        n = plan_teams_in_turns(teams, resident);
    }
    const int64_t bytes = workspace_words(teams, 1 << n, group, head_dim, max_pages) * 4;
    return bytes <= kWorkspaceBytes ? n : -1;
}

// Whether a launch of teams starts all of its blocks at once (cooperatively): where two launches fit on the chip, so
// that it never waits for its predecessor to leave. Other launches' blocks start as room is made, in the order of their
// numbers, which CUB's scans rely on as well: of all teams one at most waits for blocks that have not started.
inline bool starts_as_gang(Chip chip, int64_t blocks, int32_t head_dim) {
    return 2 * blocks <= resident_blocks(chip, head_dim);
}

// Blocks of the same launch beside `blocks` of teams: they append `items` (token, KV head) pairs, a warp each, and
// where there is little room several; where there is none they take the last turns. Up to a block an SM the grid is
// filled in any case, so that the next launch finds every SM alike.
inline int32_t plan_spare_blocks(Chip chip, int64_t blocks, int32_t head_dim, int64_t items) {
    const int64_t fill = std::max<int64_t>(chip.num_sms - blocks, 0), room = resident_blocks(chip, head_dim) - blocks,
                  needed = ceil_div(items, kTeamWarps);
    return static_cast<int32_t>(std::max(fill, room > 0 ? std::min(room, needed) : needed));
}

}  // namespace quest
