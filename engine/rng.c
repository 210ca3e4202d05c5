/* rng.c - see rng.h. */
#include "rng.h"

#include <math.h>

static uint64_t splitmix64(uint64_t *x) {
    uint64_t z = (*x += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static uint64_t rotl(uint64_t x, int k) { return (x << k) | (x >> (64 - k)); }

void rng_seed(rng *r, uint64_t seed, uint64_t stream) {
    uint64_t x = seed ^ hash_u64(stream, 0x616d616c67616d21u);
    *r = (rng){0};
    for (int i = 0; i < 4; i++) r->s[i] = splitmix64(&x);
}

uint64_t rng_u64(rng *r) {
    uint64_t *s = r->s;
    const uint64_t result = rotl(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotl(s[3], 45);
    return result;
}

uint64_t rng_below(rng *r, uint64_t n) {
    CHECK(n > 0);
    const uint64_t limit = -n % n; /* 2^64 mod n: values below it would be over-represented */
    for (;;) {
        const uint64_t v = rng_u64(r);
        if (v >= limit) return v % n;
    }
}

int64_t rng_range(rng *r, int64_t lo, int64_t hi) {
    CHECK(lo <= hi);
    return lo + (int64_t)rng_below(r, (uint64_t)(hi - lo) + 1);
}

double rng_unit(rng *r) { return (double)(rng_u64(r) >> 11) * 0x1p-53; }

double rng_normal(rng *r) {
    if (r->has_normal) {
        r->has_normal = false;
        return r->normal;
    }
    const double u = 1.0 - rng_unit(r), v = rng_unit(r); /* u in (0, 1] */
    const double radius = sqrt(-2.0 * log(u)), angle = 6.283185307179586 * v;
    r->normal = radius * sin(angle);
    r->has_normal = true;
    return radius * cos(angle);
}

double rng_exponential(rng *r, double rate) {
    CHECK(rate > 0);
    return -log(1.0 - rng_unit(r)) / rate;
}

double rng_gamma(rng *r, double shape, double scale) {
    CHECK(shape > 0 && scale > 0);
    double boost = 1.0;
    if (shape < 1.0) {
        boost = pow(1.0 - rng_unit(r), 1.0 / shape);
        shape += 1.0;
    }
    const double d = shape - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * d);
    for (;;) {
        const double x = rng_normal(r), t = 1.0 + c * x;
        if (t <= 0) continue;
        const double v = t * t * t, u = 1.0 - rng_unit(r);
        if (log(u) < 0.5 * x * x + d - d * v + d * log(v)) return boost * d * v * scale;
    }
}

double rng_lognormal(rng *r, double mu, double sigma) { return exp(mu + sigma * rng_normal(r)); }

void rng_shuffle(rng *r, int32_t *v, int64_t n) {
    for (int64_t i = n - 1; i > 0; i--) {
        const int64_t j = (int64_t)rng_below(r, (uint64_t)i + 1);
        const int32_t t = v[i];
        v[i] = v[j];
        v[j] = t;
    }
}

void philox4x32(uint64_t seed, uint64_t counter, uint32_t out[4]) {
    uint32_t c[4] = {(uint32_t)counter, (uint32_t)(counter >> 32), 0, 0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c[0], p1 = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
        c[0] = n0;
        c[1] = (uint32_t)p1;
        c[2] = n2;
        c[3] = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) out[i] = c[i];
}

double philox_unit(uint64_t seed, uint64_t counter) {
    uint32_t w[4];
    philox4x32(seed, counter, w);
    const uint64_t bits = ((uint64_t)w[0] << 32 | w[1]) >> 12;
    return ((double)bits + 0.5) * 0x1p-52;
}
