// For functions that kernels call as well as the host.
#pragma once

#ifdef __CUDACC__
#define QUEST_HOST_DEVICE __host__ __device__
#else
#define QUEST_HOST_DEVICE
#endif
