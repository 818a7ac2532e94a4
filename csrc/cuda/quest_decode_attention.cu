#include "quest_decode_attention.cuh"

namespace quest::cuda {

namespace {
template <class T>
struct Same {
    using Type = T;
};
}  // namespace

cudaError_t launch_quest_decode_attention(const FusedParams& p, int32_t size_log2, uint32_t* workspace, Chip chip,
                                          cudaStream_t stream) {
    return p.metadata.dtype == DType::kFloat8E4M3
               ? launch_quest_decode_attention_8bit(p, size_log2, workspace, chip, stream)
               : launch_team_decode_attention<Same>(p, size_log2, workspace, chip, stream);
}

QUEST_READ_PHASE_CLOCKS(quest_read_phase_clocks)

}  // namespace quest::cuda
