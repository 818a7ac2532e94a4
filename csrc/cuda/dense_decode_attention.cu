#include "quest_decode_attention.cuh"

namespace quest::cuda {

namespace {
template <class T>
struct None {
    using Type = void;
};

__global__ void clear_kernel(uint4* words, int64_t count) {
    let_successor_start();
    wait_for_predecessor();
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) words[i] = uint4{};
}
}  // namespace

cudaError_t launch_clear(uint32_t* words, int64_t count, Chip chip, cudaStream_t stream) {
    return launch(clear_kernel, ceil_div(count / 4, 256), 256, 0, chip, stream, false, reinterpret_cast<uint4*>(words),
                  count / 4);
}

cudaError_t launch_dense_decode_attention(const FusedParams& p, int32_t size_log2, uint32_t* workspace, Chip chip,
                                          cudaStream_t stream) {
    return launch_team_decode_attention<None>(p, size_log2, workspace, chip, stream);
}

}  // namespace quest::cuda
