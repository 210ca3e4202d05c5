// linear_pairs.cuh - a ring of stages that the two CTAs of a cluster fill for each other: what the
// kernels for tall batches have in common (linear_wide, linear_codes_tall, linear_w4a8_tall).
//
// A stage is full when all bytes that its CTA announced are there, whichever CTA asked for them,
// and empty when the warps of both CTAs have read it.
#ifndef LINEAR_PAIRS_CUH
#define LINEAR_PAIRS_CUH
#include "ptx_sm90.cuh"

// A kernel's beginning: barriers of kStages stages, there in both CTAs when this returns. readers:
// warps that read a stage, of both CTAs.
template <int kStages>
__device__ __forceinline__ void begin_ring_of_both(uint32_t full, uint32_t empty, int readers) {
    launch_dependents();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(full + i * 8, 1);
            barrier_init(empty + i * 8, readers);
        }
        barrier_init_fence();
    }
    __syncthreads();
    cluster_arrive(); // the other CTA writes here
    cluster_wait();
}

// All stages of all tiles of `walk`, by one warp or thread. walk.next gives a tile's place, with
// step0 and step1; by.begin(place) comes before a tile's first step, by.weights and
// by.inputs(place, step, stage) for each step. Weights of the first stages are asked for before the
// kernel before has ended.
template <int kStages, typename Place, typename Walk, typename Producer>
__device__ __forceinline__ void fill_ring_of_both(Walk walk, Producer &by, uint32_t empty) {
    int stage = 0, parity = 1, early = 0;
    Place at;
    for (bool first = true; walk.next(at); first = false) {
        by.begin(at);
        if (first) {
            for (; early < kStages && at.step0 + early < at.step1; early++)
                by.weights(at, at.step0 + early, early);
            wait_for_previous();
        }
        for (int step = at.step0; step < at.step1; step++) {
            barrier_wait(empty + stage * 8, parity); // in both CTAs
            if (early > 0)
                early--;
            else
                by.weights(at, step, stage);
            by.inputs(at, step, stage);
            if (++stage == kStages) stage = 0, parity ^= 1;
        }
    }
}
#endif
