// How a team's softmaxes become one output: the block's warps meet in shared memory, then each block merges every
// size-th chunk of four channels, from parts that travel through L2.
#pragma once
#include "attend_tile.cuh"
#include "team.cuh"

namespace quest::cuda {

// `warp_out`: [warps, head_offset(group)] floats.
template <class T, int D>
__device__ __forceinline__ void merge_team(const AttentionParams& a, const TeamSpace& space, const TeamPlace& place,
                                           OnlineSoftmax<T, D>& softmax, WarpSums<kTeamWarps>& sums, float* warp_out,
                                           int group, int size_log2) {
    const unsigned rank = place.rank, size = 1u << size_log2, pieces = group * (D / 4);
    WarpPartials<D, kTeamWarps> partials{sums, warp_out, group};
    partials.store(softmax, threadIdx.x / kWarp);
    __syncthreads();
    const unsigned chunks = pieces >> size_log2;  // of a reader
#pragma unroll 1
    for (unsigned piece = threadIdx.x; piece < pieces; piece += kTeamThreads) {
        float top, total;
        const float4 o = partials.add_up(piece / (D / 4), piece % (D / 4) * 4, &top, &total);
        uint32_t* to =
            space.parts + (((((piece & (size - 1)) << size_log2) + rank) * chunks + (piece >> size_log2)) << 3);
        publish(to, uint4{nonzero_bits(o.x), nonzero_bits(o.y), nonzero_bits(o.z), nonzero_bits(o.w)});
        publish(to + 4, uint4{nonzero_bits(top), nonzero_bits(total), 1, 1});
    }
    mark_phase(7);
    // A lane takes one block's part of one chunk; the lanes of a chunk are neighbours.
#pragma unroll 1
    for (unsigned item = threadIdx.x; item / kWarp * kWarp < pieces; item += kTeamThreads) {
        const unsigned writer = item & (size - 1), chunk = item >> size_log2,
                       channel = ((chunk << size_log2) + rank) * 4, head = place.kv_head * group + channel / D;
        T* out = const_cast<T*>(row_of<T>(a.out, place.row, head)) + channel % D;
        uint32_t* from = space.parts + ((((rank << size_log2) + writer) * chunks + chunk) << 3);
        uint4 v{}, w{};
        if (item < pieces) do
                v = peek(from), w = peek(from + 4);
            while (!complete(v) || !complete(w));
        mark_phase(8);
        float4 o{__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
        const float part_top = __uint_as_float(w.x);
        float top = part_top, total = __uint_as_float(w.y);
#pragma unroll 1
        for (unsigned other = 1; other < size; other *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, other));
        const float weight = part_top == -INFINITY ? 1.f : exp2_fast(part_top - top);  // no tokens: zeros, or NaN
        total *= weight, o.x *= weight, o.y *= weight, o.z *= weight, o.w *= weight;
#pragma unroll 1
        for (unsigned other = 1; other < size; other *= 2) {
            total += __shfl_xor_sync(kAllLanes, total, other);
            o.x += __shfl_xor_sync(kAllLanes, o.x, other), o.y += __shfl_xor_sync(kAllLanes, o.y, other);
            o.z += __shfl_xor_sync(kAllLanes, o.z, other), o.w += __shfl_xor_sync(kAllLanes, o.w, other);
        }
        if (item < pieces && writer == 0) {
            const float inverse = total == 0.f ? 0.f : reciprocal(total);
            store_four<T>(out, float4{o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse});
            if (channel % D == 0)
                a.lse[int64_t(place.row) * a.num_q_heads + head] =
                    total == 0.f ? -INFINITY : (top + log2_fast(total)) * kLn2;
        }
        if (item < pieces) publish(from, uint4{}), publish(from + 4, uint4{});
    }
}

}  // namespace quest::cuda
