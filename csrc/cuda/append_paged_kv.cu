#include "append_paged_kv.cuh"
#include "launch.h"

namespace quest::cuda {

cudaError_t launch_append_paged_kv(const AppendParams& p, Chip chip, cudaStream_t stream) {
    return dispatch(p.dtype, p.head_dim, [&](auto element, auto head_dim) {
        return dispatch_metadata(p.metadata.dtype, element, [&](auto bound) {
            return launch(append_paged_kv_kernel<decltype(element), decltype(bound), head_dim()>,
                          dim3(p.num_tokens, p.num_kv_heads), kWarp, 0, chip, stream, false, p);
        });
    });
}

}  // namespace quest::cuda
