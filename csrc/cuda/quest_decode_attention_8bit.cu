#include "quest_decode_attention.cuh"

namespace quest::cuda {

template cudaError_t launch_team_decode_attention<StoredAs<__nv_fp8_e4m3>>(const FusedParams&, bool, int32_t, uint32_t*,
                                                                           Chip, cudaStream_t);

QUEST_READ_PHASE_CLOCKS(quest_read_phase_clocks_8bit)

}  // namespace quest::cuda
