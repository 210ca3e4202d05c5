/* rng.h - seeded random numbers: a stream for workloads, a counter-based generator for sampling.
 *
 * The stream is xoshiro256** (Blackman & Vigna 2018) seeded by splitmix64; one seed gives
 * independent streams by number, so that lengths, arrivals and contents of a workload can be varied
 * one at a time. The counter generator is Philox4x32-10 (Salmon et al. 2011): the value depends on
 * (seed, counter) alone, so a request draws the same numbers whatever else is in the batch, on
 * every device. Same numbers on every platform: no libm result decides a branch of the integer
 * part. */
#ifndef AMALGAM_RNG_H
#define AMALGAM_RNG_H
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    uint64_t s[4];
    bool has_normal; /* Box-Muller makes two */
    double normal;
} rng;

/* Streams of one seed are independent of each other. */
void rng_seed(rng *r, uint64_t seed, uint64_t stream);
uint64_t rng_u64(rng *r);
/* Uniform integer in [0, n), unbiased (rejection). n > 0. */
uint64_t rng_below(rng *r, uint64_t n);
/* Uniform in [lo, hi], lo <= hi. */
int64_t rng_range(rng *r, int64_t lo, int64_t hi);
/* Uniform in [0, 1) with 53 bits. */
double rng_unit(rng *r);
/* Mean 0, variance 1. */
double rng_normal(rng *r);
/* Mean 1 / rate. rate > 0. */
double rng_exponential(rng *r, double rate);
/* Gamma with mean shape * scale (Marsaglia & Tsang 2000; boosted below shape 1). Both > 0. */
double rng_gamma(rng *r, double shape, double scale);
/* exp(N(mu, sigma^2)); median exp(mu). */
double rng_lognormal(rng *r, double mu, double sigma);
/* In-place Fisher-Yates shuffle of n int32. */
void rng_shuffle(rng *r, int32_t *v, int64_t n);

/* Philox4x32-10 block of (seed, counter) -> four words. */
void philox4x32(uint64_t seed, uint64_t counter, uint32_t out[4]);
/* Uniform in (0, 1) from the first two words of the block: 52 bits plus half an ulp. */
double philox_unit(uint64_t seed, uint64_t counter);

#ifdef __cplusplus
}
#endif
#endif
