/* Speed of the hq kernels on one thread: GB/s of words, and the ratio to memcpy in the same rounds. CPU time, medians.
 *
 *     speed [ISA number, all: -1] [key bits] [value bits] [megabytes] [rounds] [raw file of words [n][64]]
 */
#define _POSIX_C_SOURCE 200809L
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
    const int bits[2] = {argc > 2 ? atoi(argv[2]) : 3, argc > 3 ? atoi(argv[3]) : 3};
    const size_t tiles = (size_t)(argc > 4 ? atoi(argv[4]) : 256) * 1000000 / (2 * TILE) + 1;
    const int rounds = argc > 5 ? atoi(argv[5]) : 7;
    uint16_t *words = touched(tiles * 2 * TILE), *out = touched(tiles * 2 * TILE);
    FILE *file = argc > 6 ? fopen(argv[6], "rb") : NULL;
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
    void *scratch = touched(lynx_hq_scratch_size());
    for (int isa = 0; isa <= LYNX_ISA_NEON; isa++) {
        if ((only >= 0 && isa != only) || lynx_isa_select(isa) != LYNX_OK) {
            continue;
        }
        for (int part = 0; part < 2; part++) {
            memset(widths, bits[part], sizeof widths);
            const lynx_hq_tile tile = {.dtype = LYNX_BFLOAT16, .part = part, .heads = HEADS, .tokens = TOKENS, .head_dim = DIM, .widths = widths};
            lynx_hq_sizes sizes;
            CHECK(lynx_hq_measure(&tile, &sizes) == LYNX_OK);
            const size_t anchor_size = sizes.anchor + LYNX_HQ_PARAM_HEADER * sizes.blocks + sizes.max_params;
            uint8_t *anchors = touched(tiles * anchor_size), *rests = touched(tiles * sizes.rest);
            const size_t rank_size = LYNX_HQ_RANK_HEADER * sizes.blocks + sizes.max_rank;
            uint8_t *ranks = touched(tiles * rank_size);
            lynx_hq_encoded *made = touched(tiles * sizeof *made);
            static double times[STEPS][MAX_ROUNDS];
            CHECK(rounds <= MAX_ROUNDS);
            for (int round = 0; round < rounds; round++) {
                for (int step = 0; step < STEPS; step++) {
                    const double start = now();
                    if (step == 0) {
                        for (size_t i = 0; i < tiles; i++) {
                            memcpy(out + i * TILE, words + i * TILE, 2 * TILE);
                        }
                    }
                    for (size_t i = 0; i < tiles && step > 0; i++) {
                        uint8_t *anchor = anchors + i * anchor_size, *rank = ranks + i * rank_size;
                        if (step < 3) {
                            made[i] = (lynx_hq_encoded){.anchor = anchor,
                                                        .param_headers = anchor + sizes.anchor,
                                                        .params = anchor + sizes.anchor + LYNX_HQ_PARAM_HEADER * sizes.blocks,
                                                        .rest = step == 2 ? rests + i * sizes.rest : NULL,
                                                        .rank_table = step == 2 ? rank : NULL,
                                                        .rank = step == 2 ? rank + LYNX_HQ_RANK_HEADER * sizes.blocks : NULL,
                                                        .wants_rank_bound = 1};
                            CHECK(lynx_hq_encode(&tile, words + i * TILE, TOKENS * DIM, DIM, 0, sizes.blocks, &made[i], scratch) == LYNX_OK);
                        } else {
                            const lynx_hq_levels levels = {.anchor = anchor,
                                                           .param_headers = made[i].param_headers,
                                                           .params = made[i].params,
                                                           .rest = step > 3 ? made[i].rest : NULL,
                                                           .rank_table = step > 4 ? made[i].rank_table : NULL,
                                                           .rank = step > 4 ? made[i].rank : NULL,
                                                           .anchor_size = made[i].anchor_size,
                                                           .params_size = made[i].params_size,
                                                           .rank_size = made[i].rank_size};
                            lynx_hq_fault fault;
                            CHECK(lynx_hq_check(&tile, &levels, &fault) == LYNX_OK);
                            CHECK(lynx_hq_decode(&tile, &levels, out + i * TILE, TOKENS * DIM, DIM, 0, sizes.blocks, scratch, &fault) == LYNX_OK);
                        }
                    }
                    times[step][round] = now() - start;
                }
                CHECK(memcmp(out, words, tiles * 2 * TILE) == 0);
            }
            printf("isa %d, %s, %d bits\n", isa, part ? "values" : "keys", bits[part]);
            for (int step = 0; step < STEPS; step++) {
                qsort(times[step], (size_t)rounds, sizeof(double), ascending);
                const double speed = (double)(tiles * 2 * TILE) / times[step][rounds / 2] * 1e-9;
                printf("  %-14s %6.2f GB/s %5.2f of memcpy, best %6.2f GB/s\n", NAMES[step], speed,
                       times[0][rounds / 2] / times[step][rounds / 2], (double)(tiles * 2 * TILE) / times[step][0] * 1e-9);
            }
            free(anchors);
            free(rests);
            free(ranks);
            free(made);
        }
    }
    free(scratch);
    free(words);
    free(out);
    return 0;
}
