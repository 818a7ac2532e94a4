// The two vectors of a page's metadata, from its keys.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstring>

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

// a . b: neighbours are added, then neighbours of these. head_dim is a power of two.
inline float dot_in_pairs(const float* a, const float* b, int head_dim) {
    alignas(64) float x[kMaxHeadDim] = {};
    for (int d = 0; d < head_dim; d += kLanes) store(x + d, load(a + d) * load(b + d));
    for (int n = head_dim / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) x[i] = x[2 * i] + x[2 * i + 1];
    return x[0];
}

// Two points on the axis of largest deviation, nearly (quest_ops/ops.py has the formula): in float32 as above.
template <typename T, typename Bound>
void store_principal_points(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, BoundRule rule,
                            Bound* bounds) {
    alignas(64) float mean[kMaxHeadDim], deviation[kMaxHeadDim], farthest[kMaxHeadDim], axis[kMaxHeadDim] = {};
    const float count = float(num_tokens);
    for (int d = 0; d < head_dim; d += kLanes) {
        Vec sum{};
        for (int64_t t = 0; t < num_tokens; ++t) sum = sum + load(keys + t * token_stride + d);
        store(mean + d, sum / broadcast(count));
    }
    const auto deviate = [&](int64_t token) {
        for (int d = 0; d < head_dim; d += kLanes)
            store(deviation + d, load(keys + token * token_stride + d) - load(mean + d));
    };
    const auto scale_axis = [&](float by) {
        for (int d = 0; d < head_dim; d += kLanes) store(axis + d, load(axis + d) * broadcast(by));
    };
    float square = -1;
    for (int64_t t = 0; t < num_tokens; ++t) {
        deviate(t);
        const float of_token = dot_in_pairs(deviation, deviation, head_dim);
        if (of_token > square || t == 0) square = of_token, std::memcpy(farthest, deviation, sizeof(float) * head_dim);
    }
    const bool deviates = square >= FLT_MIN;
    const float length = std::sqrt(square), inverse_square = deviates ? 1 / square : 0,
                inverse_length = deviates ? 1 / length : 0;
    for (int64_t t = 0; t < num_tokens; ++t) {
        deviate(t);
        const Vec along = broadcast(dot_in_pairs(deviation, farthest, head_dim) * inverse_square);
        for (int d = 0; d < head_dim; d += kLanes) store(axis + d, load(axis + d) + along * load(deviation + d));
    }
    const float axis_square = dot_in_pairs(axis, axis, head_dim);
    scale_axis(axis_square > 0 ? 1 / std::sqrt(axis_square) : 0);
    float fourths[2] = {};  // of the keys on either side of the mean
    for (int64_t t = 0; t < num_tokens; ++t) {
        deviate(t);
        const float along = dot_in_pairs(deviation, axis, head_dim) * inverse_length, of_token = along * along;
        fourths[along > 0] += of_token * of_token;
    }
    for (int side = 0; side < 2; ++side) {
        const float radius = rule.scale * length * std::sqrt(std::sqrt(fourths[side] / count));
        const Vec signed_radius = broadcast(side == 0 ? -radius : radius);
        for (int d = 0; d < head_dim; d += kLanes)
            store_nearest(bounds + side * head_dim + d, load(mean + d) + signed_radius * load(axis + d) + Vec{});
    }
}

template <typename T, typename Bound>
void store_page_bounds(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, BoundRule rule,
                       Bound* bounds) {
    if (rule.kind == BoundKind::kMinMax)
        store_min_max(keys, token_stride, num_tokens, head_dim, bounds);
    else if (rule.kind == BoundKind::kPrincipal)
        store_principal_points(keys, token_stride, num_tokens, head_dim, rule, bounds);
    else
        store_mean_bounds(keys, token_stride, num_tokens, head_dim, rule, bounds);
}

}  // namespace quest::cpu::QUEST_CPU_ISA
