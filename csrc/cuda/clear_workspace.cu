#include "device.cuh"
#include "launch.h"

namespace quest::cuda {

namespace {
__global__ void clear_kernel(uint4* words, int64_t count) {
    wait_for_predecessor();
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) words[i] = uint4{};
    __threadfence();  // a launch of teams counts its blocks before it waits
    let_successor_start();
}
}  // namespace

cudaError_t launch_clear(uint32_t* words, int64_t count, Chip chip, cudaStream_t stream) {
    return launch(clear_kernel, ceil_div(count / 4, 256), 256, 0, chip, stream, false, reinterpret_cast<uint4*>(words),
                  count / 4);
}

}  // namespace quest::cuda
