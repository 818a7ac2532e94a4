#include "estimate_page_scores.cuh"
#include "launch.h"

namespace quest::cuda {

cudaError_t launch_estimate_page_scores(const EstimateParams& p, Chip chip, cudaStream_t stream) {
    const int32_t blocks = plan_walking_blocks(chip, int64_t(p.num_rows) * p.num_kv_heads, p.paging.max_pages(),
                                               kTileTokens * kWarpsPerBlock);
    const dim3 grid(blocks, p.num_kv_heads, p.num_rows);
    return dispatch(p.dtype, p.head_dim, [&](auto element, auto head_dim) {
        return dispatch_metadata(p.metadata.dtype, element, [&](auto bound) {
            return launch(estimate_page_scores_kernel<decltype(element), decltype(bound), head_dim()>, grid,
                          kWarp * kWarpsPerBlock, 0, chip, stream, false, p);
        });
    });
}

}  // namespace quest::cuda
