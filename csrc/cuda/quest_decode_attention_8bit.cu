#include "quest_decode_attention.cuh"

namespace quest::cuda {

namespace {
template <class T>
struct EightBits {
    using Type = __nv_fp8_e4m3;
};
}  // namespace

cudaError_t launch_quest_decode_attention_8bit(const FusedParams& p, int32_t size_log2, uint32_t* workspace, Chip chip,
                                               cudaStream_t stream) {
    return launch_team_decode_attention<EightBits>(p, size_log2, workspace, chip, stream);
}

QUEST_READ_PHASE_CLOCKS(quest_read_phase_clocks_8bit)

}  // namespace quest::cuda
