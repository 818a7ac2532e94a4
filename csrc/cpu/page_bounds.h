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

template <typename T>
Vec mean_of(const T* keys, int64_t token_stride, int64_t num_tokens) {
    Vec sum{};
    for (int64_t t = 0; t < num_tokens; ++t) sum = sum + load(keys + t * token_stride);
    return sum / broadcast(float(num_tokens));
}

// Centre -+ radius. In float32, one rounding an operation (CMakeLists.txt turns contraction off), tokens in their
// order: every instruction set, the CUDA kernels and the twin agree in all bits.
template <typename T, typename Bound>
void store_mean_bounds(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, BoundRule rule,
                       Bound* bounds) {
    const bool squared = rule.kind == BoundKind::kMeanStd;
    const Vec count = broadcast(float(num_tokens));
    for (int d = 0; d < head_dim; d += kLanes) {
        const Vec mean = mean_of(keys + d, token_stride, num_tokens);
        Vec spread{};
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
    for (int d = 0; d < head_dim; d += kLanes) store(mean + d, mean_of(keys + d, token_stride, num_tokens));
    const auto deviate = [&](int64_t token) {
        for (int d = 0; d < head_dim; d += kLanes)
            store(deviation + d, load(keys + token * token_stride + d) - load(mean + d));
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
    const Vec inverse_norm = broadcast(axis_square > 0 ? 1 / std::sqrt(axis_square) : 0);
    for (int d = 0; d < head_dim; d += kLanes) store(axis + d, load(axis + d) * inverse_norm);
    float fourths[2] = {};  // of the keys on either side of the mean
    for (int64_t t = 0; t < num_tokens; ++t) {
        deviate(t);
        const float along = dot_in_pairs(deviation, axis, head_dim) * inverse_length, of_token = along * along;
        fourths[along > 0] += of_token * of_token;
    }
    for (int side = 0; side < 2; ++side) {
        const float radius = rule.scale * length * std::sqrt(std::sqrt(fourths[side] / float(num_tokens)));
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

// The scale, in float16, of numbers of magnitude up to `largest`.
inline Half scale_for(float largest) {
    if (largest != largest) return {0x7e00};
    constexpr uint16_t kLargestHalf = 0x7bff;
    Half scale[kLanes] = {{half_from_float(largest / kLargestCode)}};
    if (load(scale)[0] * kLargestCode < largest) ++scale[0].bits;
    return {std::min(scale[0].bits, kLargestHalf)};
}

// The code, -7 to 7, of a number that is `ratio` scales.
inline Vec round_code(Vec ratio, Vec number, Vec scale, Rounding rounding) {
    ratio = ratio > 8.0f ? broadcast(8) : ratio < -8.0f ? broadcast(-8) : ratio;
    Vec code = ratio + 0x1.8p23f - 0x1.8p23f;  // the nearest integer, half to even
    if (rounding == Rounding::kDown) {
        code = code > ratio ? code - 1.0f : code;
        code = code * scale > number ? code - 1.0f : code;
    } else if (rounding == Rounding::kUp) {
        code = code < ratio ? code + 1.0f : code;
        code = code * scale < number ? code + 1.0f : code;
    }
    return code > kLargestCode ? broadcast(kLargestCode) : code < -kLargestCode ? broadcast(-kLargestCode) : code;
}

// codes [D / 8] and scales [D / 32] of the numbers x [D], codes rounded outward for a lower or an upper bound.
inline void store_packed_vector(const float* x, int head_dim, Rounding rounding, PackedInt4* codes,
                                PackedInt4* scales) {
    for (int c = 0; c < head_dim / kScaledChannels; ++c, x += kScaledChannels) {
        Vec most{};
        for (int i = 0; i < kScaledChannels; i += kLanes) most = max_nan(most, absolute(load(x + i)));
        float largest = most[0];
        for (int i = 1; i < kLanes; ++i) largest = largest != largest || largest > most[i] ? largest : most[i];
        const Half scale = scale_for(largest);
        std::memcpy(scales + c * sizeof(scale), &scale, sizeof(scale));
        Half repeated[kLanes];
        for (Half& each : repeated) each = scale;
        const Vec s = load(repeated);
        alignas(64) int32_t nibbles[kScaledChannels];
        for (int i = 0; i < kScaledChannels; i += kLanes) {
            const Vec number = load(x + i), ratio = number / s;
            const Vec code = (s > 0.0f) ? round_code(ratio, number, s, rounding) : Vec{};
            const IntVec nibble = __builtin_convertvector(code, IntVec) + 8;
            std::memcpy(nibbles + i, &nibble, sizeof(nibble));
        }
        for (int t = 0; t < 4; ++t) {
            uint32_t word = 0;
            for (int i = 0; i < 8; ++i) word |= uint32_t(nibbles[8 * t + i]) << packed_shift(i);
            std::memcpy(codes + packed_word(head_dim, c, t) * sizeof(word), &word, sizeof(word));
        }
    }
}

// In 4 bits, the format of params.h: the two vectors as float32, then their codes.
template <typename T>
void store_page_bounds(const T* keys, int64_t token_stride, int64_t num_tokens, int head_dim, BoundRule rule,
                       PackedInt4* page) {
    alignas(64) float bounds[2 * kMaxHeadDim];
    store_page_bounds(keys, token_stride, num_tokens, head_dim, rule, bounds);
    const bool outward = rule.kind == BoundKind::kMinMax;
    PackedInt4* scales = page + head_dim;
    store_packed_vector(bounds, head_dim, outward ? Rounding::kDown : Rounding::kNearest, page, scales);
    store_packed_vector(bounds + head_dim, head_dim, outward ? Rounding::kUp : Rounding::kNearest, page + head_dim / 2,
                        scales + head_dim / 16);
}

}  // namespace quest::cpu::QUEST_CPU_ISA
