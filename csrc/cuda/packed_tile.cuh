// Scoring by metadata in 4 bits a number (params.h has the format): codes are multiplied as numbers of the query's
// type, exactly, and each 32 channels' product by the scale that these share.
#pragma once
#include "score_tile.cuh"

namespace quest::cuda {

// Codes as an operand, without arithmetic: in float16 as the last bits of a number that is subnormal, n 2^-24 where
// they are its last four and 16 times that where they are the four before; in bfloat16 as 128 + n.
template <class T>
struct Codes {
    static constexpr bool kSubnormal = std::is_same_v<T, half>;
    static constexpr float kZero = kSubnormal ? 8.f / (1 << 24) : 136.f;  // what a channel of value 0 counts as
    static constexpr float kUnit = kSubnormal ? float(1 << 24) : 1.f;

    // Pair i: channels 2 i and 2 i + 1; of subnormal ones those of odd i are 16 times as large.
    static __device__ __forceinline__ uint4 pairs(uint32_t word) {
        if constexpr (kSubnormal) {
            const uint32_t later = word >> 8;
            return {word & 0x000f000fu, word & 0x00f000f0u, later & 0x000f000fu, later & 0x00f000f0u};
        } else {
            auto pair = [&](int i) { return (word >> 4 * i & 0x000f000fu) | 0x43004300u; };
            return {pair(0), pair(1), pair(2), pair(3)};
        }
    }
};

// 32 channels of a group's query heads: this lane's parts that go with hi and with lo, those of even pairs first, and
// what a product for heads 2 t and 2 t + 1 begins with, so that codes count from 8 on. As the product's registers have
// it.
struct PackedQuery {
    uint4 hi, lo;
    float4 hi_start, lo_start;
};

template <class T, int D>
struct PageTile<T, FourBits, D> {
    static constexpr bool kNarrow = true;
    static constexpr int kChunks = D / kScaledChannels, kWords = kChunks < 4 ? kChunks : 4, kLoads = kChunks / kWords;
    static constexpr uint32_t kPageBytes = kPageElements<FourBits, D>;
    using Source = PageSource<kPageBytes>;
    uint32_t lo[2][kChunks], hi[2][kChunks], scales[2][kChunks];  // scales: pairs of float16, those of lo, those of hi

    static __device__ __forceinline__ int channel(int c) { return 32 * c + threadIdx.x % 4 * 8; }
    static __device__ __forceinline__ int lane_bytes() { return threadIdx.x % 4 * 4 * kWords; }
    static __device__ __forceinline__ const char* lane_part(const Metadata& metadata, int kv_head) {
        return static_cast<const char*>(metadata.data) + kv_head * metadata.head_stride + lane_bytes();
    }

    __device__ __forceinline__ void load_part(const Source& from, int part) {
#pragma unroll
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
            const char* codes = from.bounds[half_tile] + 16 * kWords * part;
            load_words(lo[half_tile], part, codes);
            load_words(hi[half_tile], part, codes + D / 2);
            if (part < kLoads - 1) continue;
#pragma unroll
            for (int i = 0; i < kLoads; ++i)
                load_words(scales[half_tile], i, from.bounds[half_tile] - lane_bytes() + D + 4 * kWords * i);
        }
    }
    __device__ __forceinline__ void load(const Source& from) {
#pragma unroll
        for (int part = 0; part < kLoads; ++part) load_part(from, part);
    }
    static __device__ __forceinline__ void prefetch(const Source& from) { from.prefetch(lane_bytes()); }

    // q: channels 32 c + 8 t .. of head g.
    using Query = PackedQuery;
    static __device__ __forceinline__ PackedQuery prepare(const uint4& q, const QueryParts<T>& parts) {
        const uint4 hi = parts.of_hi(q), lo = parts.of_lo(q);
        return {{hi.x, hi.z, hi.y, hi.w}, {lo.x, lo.z, lo.y, lo.w}, start_of(hi), start_of(lo)};
    }

    template <class QueryOf, class Done>
    __device__ __forceinline__ void multiply(float (&c)[4], const QueryParts<T>& parts, QueryOf&& query, Done&& done) {
        float above[4] = {}, below[4] = {};
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            const PackedQuery& q = query(chunk);
            add_chunk(above, hi, kChunks + chunk, q.hi, q.hi_start);
            add_chunk(below, lo, chunk, q.lo, q.lo_start);
            if (chunk % kWords == kWords - 1) done(chunk / kWords);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] = parts.score(above[i], below[i]) * Codes<T>::kUnit;
    }

private:
    static __device__ __forceinline__ float4 start_of(const uint4& q) {
        using Pair = typename Packed<T>::Pair;
        float sum = 0;
#pragma unroll
        for (const uint32_t pair : {q.x, q.y, q.z, q.w}) {
            const float2 two = Packed<T>::to_floats(bits_as<Pair>(pair));
            sum += two.x + two.y;
        }
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        const int head = threadIdx.x % 4 * 2;
        const float even = -Codes<T>::kZero * __shfl_sync(kAllLanes, sum, 4 * head),
                    odd = -Codes<T>::kZero * __shfl_sync(kAllLanes, sum, 4 * head + 4);
        return {even, odd, even, odd};
    }
    static __device__ __forceinline__ void load_words(uint32_t (&to)[kChunks], int part, const char* from) {
        if constexpr (kWords == 4) {
            const uint4 v = load_streaming(from);
            to[4 * part] = v.x, to[4 * part + 1] = v.y, to[4 * part + 2] = v.z, to[4 * part + 3] = v.w;
        } else {
            const uint2 v = load_streaming_pair(from);
            to[0] = v.x, to[1] = v.y;
        }
    }
    // scale: which of the page's.
    __device__ __forceinline__ void add_chunk(float (&total)[4], const uint32_t (&codes)[2][kChunks], int scale,
                                              const uint4& q, const float4& start) const {
        const uint4 g = Codes<T>::pairs(codes[0][scale % kChunks]), g8 = Codes<T>::pairs(codes[1][scale % kChunks]);
        float sums[2][4] = {{start.x, start.y, start.z, start.w}, {}};
        mma_m16n8k16<T>(sums[0], g.x, g8.x, g.z, g8.z, q.x, q.y);
        mma_m16n8k16<T>(sums[1], g.y, g8.y, g.w, g8.w, q.z, q.w);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const half2 pair = bits_as<half2>(scales[i / 2][scale / 2]);
            const float both = Codes<T>::kSubnormal ? fmaf(sums[1][i], 1 / 16.f, sums[0][i]) : sums[0][i] + sums[1][i];
            total[i] = fmaf(scale % 2 == 0 ? __low2float(pair) : __high2float(pair), both, total[i]);
        }
    }
};

}  // namespace quest::cuda
