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
    switch (p.metadata.dtype) {
        case DType::kInt4: return launch_quest_decode_attention_4bit(p, size_log2, workspace, chip, stream);
        case DType::kFloat8E4M3: return launch_quest_decode_attention_8bit(p, size_log2, workspace, chip, stream);
        default: return launch_team_decode_attention<Same>(p, size_log2, workspace, chip, stream);
    }
}

QUEST_READ_PHASE_CLOCKS(quest_read_phase_clocks)

}  // namespace quest::cuda
