/* Which kernels run: the best that the machine has, unless LYNXPROTO_ISA or lynx_isa_select says otherwise. */
#include <stdatomic.h>
#include <stdlib.h>

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* clang's __builtin_cpu_supports does not know it. In a virtual machine the question takes microseconds: asked once. */
static int has_f16c(void) {
    static _Atomic int known; /* 0: not asked yet */
    if (known == 0) {
        unsigned a, b, c, d;
        known = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) ? 2 : 1;
    }
    return known == 2;
}
#endif

static _Atomic(const lynx_kernels *) current;

static const lynx_kernels *kernels_of(int isa) {
    switch (isa) {
    case LYNX_ISA_SCALAR:
        return &lynx_scalar;
#if defined(__x86_64__)
    case LYNX_ISA_AVX2:
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c()
                   ? &lynx_avx2
                   : NULL;
    case LYNX_ISA_AVX512:
        return kernels_of(LYNX_ISA_AVX2) != NULL && __builtin_cpu_supports("avx512f") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
                       __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg")
                   ? &lynx_avx512
                   : NULL;
#elif defined(__aarch64__)
    case LYNX_ISA_NEON:
        return &lynx_neon;
#endif
    default:
        return NULL;
    }
}

/* By name; the best comes last. */
static const struct {
    const char *name;
    int isa;
} CHOICES[] = {
    {"scalar", LYNX_ISA_SCALAR}, {"neon", LYNX_ISA_NEON}, {"avx2", LYNX_ISA_AVX2}, {"avx512", LYNX_ISA_AVX512}};
enum { CHOICE_COUNT = sizeof CHOICES / sizeof CHOICES[0] };

int lynx_isa_best(void) {
    int best = LYNX_ISA_SCALAR;
    for (int i = 0; i < CHOICE_COUNT; i++) {
        best = kernels_of(CHOICES[i].isa) != NULL ? CHOICES[i].isa : best;
    }
    return best;
}

const lynx_kernels *lynx_current(void) {
    const lynx_kernels *kernels = atomic_load_explicit(&current, memory_order_acquire);
    if (kernels == NULL) {
        const char *wish = getenv("LYNXPROTO_ISA");
        for (int i = 0; i < CHOICE_COUNT && wish != NULL && kernels == NULL; i++) {
            kernels = strcmp(wish, CHOICES[i].name) == 0 ? kernels_of(CHOICES[i].isa) : NULL;
        }
        kernels = kernels != NULL ? kernels : kernels_of(lynx_isa_best());
        atomic_store_explicit(&current, kernels, memory_order_release);
    }
    return kernels;
}

int lynx_isa(void) {
    const lynx_kernels *kernels = lynx_current();
    int isa = LYNX_ISA_SCALAR;
    for (int i = 0; i < CHOICE_COUNT; i++) {
        isa = kernels_of(CHOICES[i].isa) == kernels ? CHOICES[i].isa : isa;
    }
    return isa;
}

int lynx_isa_select(int isa) {
    const lynx_kernels *kernels = kernels_of(isa);
    if (kernels == NULL) {
        return LYNX_ERR_ARGUMENT;
    }
    atomic_store_explicit(&current, kernels, memory_order_release);
    return LYNX_OK;
}

int lynx_abi_version(void) {
    return LYNX_ABI_VERSION;
}

const char *lynx_strerror(int error) {
    switch (error) {
    case LYNX_OK:
        return "no error";
    case LYNX_ERR_ARGUMENT:
        return "an argument describes no tile";
    case LYNX_ERR_SPACE:
        return "a buffer is too small";
    case LYNX_ERR_TRUNCATED:
        return "truncated";
    case LYNX_ERR_PADDED:
        return "longer than its content";
    case LYNX_ERR_PARAMETER:
        return "a group parameter is out of range";
    case LYNX_ERR_CODE:
        return "a code is outside the range of its width";
    case LYNX_ERR_RANK:
        return "ranks do not match the codes";
    case LYNX_ERR_FOLD:
        return "folded planes do not match their size";
    case LYNX_ERR_HEADER:
        return "unknown mode, or reserved bytes that are not zero";
    case LYNX_ERR_LEVEL:
        return "the payload is of another level";
    case LYNX_ERR_MIXED:
        return "some levels of the chunk are stored and others are not";
    case LYNX_ERR_TABLE:
        return "a width is over 8 or padding not zero";
    case LYNX_ERR_FRAME:
        return "no frame, or a frame whose header is damaged";
    case LYNX_ERR_VERSION:
        return "a frame of another version";
    case LYNX_ERR_CRITICAL:
        return "something unknown that must be understood";
    case LYNX_ERR_TOO_LARGE:
        return "a payload beyond the limit";
    case LYNX_ERR_PROTOCOL:
        return "a rule of the wire format is broken";
    case LYNX_ERR_LIMIT:
        return "more than a limit allows";
    case LYNX_ERR_CRC:
        return "a damaged payload";
    case LYNX_ERR_CAPTURE:
        return "no capture, or a damaged one";
    case LYNX_ERR_UNSUPPORTED:
        return "not supported by this library";
    case LYNX_STORED:
        return "the tile is stored";
    case LYNX_UNDECIDED:
        return "whether the tile is stored is not known yet";
    case LYNX_MORE:
        return "more bytes are needed";
    case LYNX_END:
        return "there is nothing more";
    default:
        return "unknown error";
    }
}
