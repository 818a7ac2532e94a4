#include "launch.h"
#include "update_page_metadata.cuh"

namespace quest::cuda {

cudaError_t launch_update_page_metadata(const UpdateParams& p, Chip chip, cudaStream_t stream) {
    const int32_t blocks =
        plan_walking_blocks(chip, int64_t(p.num_requests) * p.num_kv_heads, p.paging.max_pages(), kWarpsPerBlock);
    return dispatch(p.dtype, p.head_dim, [&](auto element, auto head_dim) {
        return dispatch_metadata(p.metadata.dtype, element, [&](auto bound) {
            return launch(update_page_metadata_kernel<decltype(element), decltype(bound), head_dim()>,
                          dim3(blocks, p.num_kv_heads, p.num_requests), kWarp * kWarpsPerBlock, 0, chip, stream, false,
                          p);
        });
    });
}

}  // namespace quest::cuda
