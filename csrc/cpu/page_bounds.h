// Channel-wise minimum and maximum of a page's keys.
#pragma once
#include "isa.h"

namespace quest::cpu::QUEST_CPU_ISA {

// keys: num_tokens rows, token_stride apart; bounds [2, D]: lo, hi. NaN stays NaN. Which of -0 and +0 a minimum returns
// depends on the order of its operands, so zero is always stored as +0.
template <typename T, typename Bound>
void store_page_bounds(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, Bound* bounds) {
    for (int d = 0; d < head_dim; d += kLanes) {
        Vec lo = load(keys + d), hi = lo;
        for (int64_t t = 1; t < num_tokens; ++t) {
            const Vec key = load(keys + t * token_stride + d);
            lo = min_nan(lo, key);
            hi = max_nan(hi, key);
        }
        store_lower(bounds + d, lo + Vec{});
        store_upper(bounds + head_dim + d, hi + Vec{});
    }
}

}  // namespace quest::cpu::QUEST_CPU_ISA
