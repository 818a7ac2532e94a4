#include "quest_decode_attention.cuh"

namespace quest::cuda {

namespace {
template <class T>
struct Fixed {
    using Type = FourBits;
};
}  // namespace

cudaError_t launch_quest_decode_attention_4bit(const FusedParams& p, int32_t size_log2, uint32_t* workspace, Chip chip,
                                               cudaStream_t stream) {
    return launch_team_decode_attention<Fixed>(p, size_log2, workspace, chip, stream);
}

QUEST_READ_PHASE_CLOCKS(quest_read_phase_clocks_4bit)

}  // namespace quest::cuda
