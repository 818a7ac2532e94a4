// The launch planner: pure functions of shapes and chip, tested without a GPU. Shapes are static under a CUDA graph, so
// grids depend on them alone; kernels find the lengths on the device.
#pragma once
#include <algorithm>
#include <cstdint>

namespace quest {

struct Chip {
    int32_t capability;  // 90 for sm_90
    int32_t num_sms;
};

constexpr int kTileTokens = 16;      // tokens a warp attends to at once, and pages it scores at once: the rows of an mma
constexpr int kWarpsPerBlock = 4;
constexpr int kMaxSplits = 128;      // partial results a merge block reads for one head

inline int32_t ceil_div(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

// Programmatic dependent launch exists from sm_90 on.
inline bool overlaps_launches(Chip chip) { return chip.capability >= 90; }

// Blocks that walk the pages of one of `items` (row or request, KV head) pairs, `pages_per_block` at a time: enough to fill the chip
// twice over, no more than there are pages.
inline int32_t plan_walking_blocks(Chip chip, int64_t items, int32_t max_pages, int32_t pages_per_block) {
    constexpr int kResident = 8;  // blocks of 128 threads an SM
    const int32_t most = std::max(ceil_div(max_pages, pages_per_block), 1);
    return std::clamp(ceil_div(2LL * chip.num_sms * kResident, std::max<int64_t>(items, 1)), 1, most);
}

// Blocks that share the tiles of one (row, KV head) in sparse_decode_attention. `tiles` is the most that a row can have.
// Costs are in tiles: a block's longest warp, its start, and what the merge reads.
inline int32_t plan_attention_splits(Chip chip, int64_t items, int64_t tiles, int32_t head_dim) {
    constexpr double kBlockStart = 2.0, kMergeStart = 2.0, kMergeSplit = 0.05;
    const int64_t resident = static_cast<int64_t>(chip.num_sms) * (head_dim <= 128 ? 3 : 2);
    int32_t best = 1;
    double best_cost = 1e30;
    const int32_t most = static_cast<int32_t>(std::clamp<int64_t>(ceil_div(tiles, kWarpsPerBlock), 1, kMaxSplits));
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

}  // namespace quest
