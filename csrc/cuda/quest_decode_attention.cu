#include "quest_decode_attention.cuh"

namespace quest::cuda {

extern template cudaError_t launch_team_decode_attention<StoredAs<FourBits>>(const FusedParams&, bool, int32_t,
                                                                             uint32_t*, Chip, cudaStream_t);
extern template cudaError_t launch_team_decode_attention<StoredAs<__nv_fp8_e4m3>>(const FusedParams&, bool, int32_t,
                                                                                  uint32_t*, Chip, cudaStream_t);

static cudaError_t launch_by_metadata(DType metadata, const FusedParams& p, bool dense, int32_t size_log2,
                                      uint32_t* workspace, Chip chip, cudaStream_t stream) {
    auto* launch = launch_team_decode_attention<StoredAlike>;
    if (metadata == DType::kInt4) launch = launch_team_decode_attention<StoredAs<FourBits>>;
    if (metadata == DType::kFloat8E4M3) launch = launch_team_decode_attention<StoredAs<__nv_fp8_e4m3>>;
    return launch(p, dense, size_log2, workspace, chip, stream);
}

cudaError_t launch_quest_decode_attention(const FusedParams& p, int32_t size_log2, uint32_t* workspace, Chip chip,
                                          cudaStream_t stream) {
    return launch_by_metadata(p.metadata.dtype, p, false, size_log2, workspace, chip, stream);
}
cudaError_t launch_dense_decode_attention(const FusedParams& p, int32_t size_log2, uint32_t* workspace, Chip chip,
                                          cudaStream_t stream) {
    return launch_by_metadata(p.append.metadata.dtype, p, true, size_log2, workspace, chip, stream);
}

QUEST_READ_PHASE_CLOCKS(quest_read_phase_clocks)

}  // namespace quest::cuda
