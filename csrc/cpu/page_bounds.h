// The two vectors of a page's metadata, from its keys.
#pragma once
#include "isa.h"

namespace quest::cpu::QUEST_CPU_ISA {

// keys: num_tokens rows, token_stride apart; bounds [2, D]: lo, hi. NaN stays NaN. Which of -0 and +0 a minimum returns
// depends on the order of its operands, so zero is always stored as +0.
template <typename T, typename Bound>
void store_min_max(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, Bound* bounds) {
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

// Centre -+ radius. In float32, one rounding an operation (CMakeLists.txt turns contraction off), tokens in their
// order: every instruction set, the CUDA kernels and the twin agree in all bits.
template <typename T, typename Bound>
void store_mean_bounds(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, BoundRule rule,
                       Bound* bounds) {
    const bool squared = rule.kind == BoundKind::kMeanStd;
    const Vec count = broadcast(float(num_tokens));
    for (int d = 0; d < head_dim; d += kLanes) {
        Vec sum{}, spread{};
        for (int64_t t = 0; t < num_tokens; ++t) sum = sum + load(keys + t * token_stride + d);
        const Vec mean = sum / count;
        for (int64_t t = 0; t < num_tokens; ++t) {
            const Vec deviation = load(keys + t * token_stride + d) - mean;
            spread = spread + (squared ? deviation * deviation : absolute(deviation));
        }
        spread = spread / count;
        const Vec radius = broadcast(rule.scale) * (squared ? square_root(spread) : spread);
        store_nearest(bounds + d, mean - radius + Vec{});
        store_nearest(bounds + head_dim + d, mean + radius + Vec{});
    }
}

template <typename T, typename Bound>
void store_page_bounds(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, BoundRule rule,
                       Bound* bounds) {
    if (rule.kind == BoundKind::kMinMax)
        store_min_max(keys, token_stride, num_tokens, head_dim, bounds);
    else
        store_mean_bounds(keys, token_stride, num_tokens, head_dim, rule, bounds);
}

}  // namespace quest::cpu::QUEST_CPU_ISA
