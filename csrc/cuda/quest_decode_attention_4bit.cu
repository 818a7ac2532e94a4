#include "quest_decode_attention.cuh"

namespace quest::cuda {

template cudaError_t launch_team_decode_attention<StoredAs<FourBits>>(const FusedParams&, bool, int32_t, uint32_t*,
                                                                      Chip, cudaStream_t);

QUEST_READ_PHASE_CLOCKS(quest_read_phase_clocks_4bit)

}  // namespace quest::cuda
