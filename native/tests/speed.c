/* Speed of the hq kernels on one thread: GB/s of words, and the ratio to memcpy in the same rounds. CPU time, medians.
 *
 *     speed [ISA number, all: -1] [fast, uniform (keys of 3 bits), balanced or dense] [megabytes] [rounds] [raw file of words [n][64]]
 */
#define _POSIX_C_SOURCE 200809L
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "lynxproto.h"

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

enum { HEADS = 8, TOKENS = 2048, DIM = 64, TILE = HEADS * TOKENS * DIM, STEPS = 6, MAX_ROUNDS = 101 };
static const char *const NAMES[STEPS] = {"memcpy", "encode anchor", "encode all", "decode anchor", "decode 8-bit", "decode exact"};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void *touched(size_t size) {
    void *p = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    CHECK(p != NULL);
    return memset(p, 1, (size + 4095) / 4096 * 4096);
}

static uint16_t synthetic(size_t i) { /* channels with their own means and spreads */
    static uint64_t state = 88172645463325252ull;
    float x = 0;
    for (int j = 0; j < 4; j++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        x += (float)(state >> 40) * 0x1p-24f - 0.5f;
    }
    const size_t c = i % DIM;
    x = (x + (float)(c % 7) * 0.3f - 0.9f) * (0.5f + (float)(c % 5));
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x8000) >> 16);
}

int main(int argc, char **argv) {
    const int only = argc > 1 ? atoi(argv[1]) : -1;
    const bool uniform = argc > 2 && strcmp(argv[2], "uniform") == 0, dense = argc > 2 && strcmp(argv[2], "dense") == 0;
    const bool fold = argc > 2 && strcmp(argv[2], "fast") != 0 && !uniform;
    const size_t tiles = (size_t)(argc > 3 ? atoi(argv[3]) : 256) * 1000000 / (2 * TILE) + 1;
    const int rounds = argc > 4 ? atoi(argv[4]) : 7;
    CHECK(rounds <= MAX_ROUNDS);
    uint16_t *words = touched(tiles * 2 * TILE), *out = touched(tiles * 2 * TILE);
    FILE *file = argc > 5 ? fopen(argv[5], "rb") : NULL;
    for (size_t at = 0; at < tiles * TILE;) {
        if (file != NULL) {
            const size_t n = fread(words + at, 2, tiles * TILE - at, file);
            at += n;
            CHECK(n != 0 || at != 0);
            rewind(file);
        } else {
            words[at] = synthetic(at);
            at++;
        }
    }
    uint8_t widths[HEADS * DIM];
    memset(widths, 3, sizeof widths);
    void *scratch = touched(lynx_hq_scratch_size());
    for (int isa = 0; isa <= LYNX_ISA_NEON; isa++) {
        if ((only >= 0 && isa != only) || lynx_isa_select(isa) != LYNX_OK) {
            continue;
        }
        for (int part = 0; part < 2; part++) {
            const lynx_hq_config config = {.dtype = LYNX_BFLOAT16, .part = part, .heads = HEADS, .tokens = TOKENS, .head_dim = DIM,
                                           .levels = 3, .fold = fold, .scaling = 1, .widths = part == LYNX_KEY && !uniform ? NULL : widths,
                                           .range_bits = HEADS * DIM * (dense ? 26 : 30) / 10};
            lynx_hq_bounds bounds;
            CHECK(lynx_hq_measure(&config, &bounds) == LYNX_OK);
            const uint64_t size = bounds.level[0] + bounds.level[1] + bounds.level[2];
            uint8_t *payloads = touched(tiles * size);
            uint64_t(*sizes)[3] = touched(tiles * sizeof *sizes);
            void *plan = touched(bounds.plan);
            static double times[STEPS][MAX_ROUNDS];
            for (int round = 0; round < rounds; round++) {
                for (int step = 0; step < STEPS; step++) {
                    const double start = now();
                    for (size_t i = 0; i < tiles; i++) {
                        uint8_t *const at = payloads + i * size;
                        uint8_t *const levels[3] = {at, at + bounds.level[0], at + bounds.level[0] + bounds.level[1]};
                        uint8_t *const first[3] = {at, NULL, NULL};
                        const lynx_view in = {.words = words + i * TILE, .head_stride = TOKENS * DIM, .token_stride = DIM};
                        const lynx_view to = {.words = out + i * TILE, .head_stride = TOKENS * DIM, .token_stride = DIM};
                        if (step == 0) {
                            memcpy(out + i * TILE, words + i * TILE, 2 * TILE);
                        } else if (step < 3) {
                            uint8_t *const *wanted = step == 1 ? first : levels;
                            CHECK(lynx_hq_encode_tile(&config, &in, wanted, sizes[i], plan, scratch) == LYNX_OK);
                        } else {
                            const uint8_t *const given[3] = {levels[0], levels[1], levels[2]};
                            lynx_hq_fault fault;
                            CHECK(lynx_hq_open(&config, given, sizes[i], step - 2, plan, &fault) == LYNX_OK);
                            CHECK(lynx_hq_decode(plan, &to, 0, bounds.blocks, scratch, &fault) == LYNX_OK);
                        }
                    }
                    times[step][round] = now() - start;
                }
                CHECK(memcmp(out, words, tiles * 2 * TILE) == 0);
            }
            printf("isa %d, %s\n", isa, part ? "values" : "keys");
            for (int step = 0; step < STEPS; step++) {
                qsort(times[step], (size_t)rounds, sizeof(double), ascending);
                const double speed = (double)(tiles * 2 * TILE) / times[step][rounds / 2] * 1e-9;
                printf("  %-14s %6.2f GB/s %5.2f of memcpy, best %6.2f GB/s\n", NAMES[step], speed,
                       times[0][rounds / 2] / times[step][rounds / 2], (double)(tiles * 2 * TILE) / times[step][0] * 1e-9);
            }
            free(payloads);
            free(sizes);
            free(plan);
        }
    }
    free(scratch);
    free(words);
    free(out);
    return 0;
}
