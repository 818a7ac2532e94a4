#include "launch.h"
#include "select_topk_pages.cuh"

namespace quest::cuda {

cudaError_t launch_select_topk_pages(const SelectParams& p, Chip chip, cudaStream_t stream) {
    return launch(select_topk_pages_kernel, dim3(p.num_heads, p.num_rows), kSelectThreads, 0, chip, stream, false, p);
}

}  // namespace quest::cuda
