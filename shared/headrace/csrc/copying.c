// Copies that carry their CRC-32C, for processors with SSE 4.2.
//
// What is written and what is summed is one register, loaded once, so that the checksum is the
// copy's own even where somebody changes the source meanwhile. Stores go past the caches: a copy
// that is larger than they are would first have every line of its target read.
// Three parts of the input are summed side by side, as one such instruction takes three cycles and
// one may begin in each; their sums are put together by tables for "followed by STRIDE zero bytes"
// (M. Adler, "crc32c.c", 2013, has the idea).

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define FAST __attribute__((target("sse4.2")))
#define STRIDE 2688  // a multiple of 64; three of them are two pages, nearly
#define POLYNOMIAL 0x82f63b78u

struct job {
    uint64_t target;  // an address; 0: the source is summed, not copied
    uint64_t source;
    uint64_t size;
    uint64_t crc;  // the answer
};

static uint32_t table[4][256];

static uint32_t times(const uint32_t *matrix, uint32_t vector) {
    uint32_t sum = 0;
    for (; vector; vector >>= 1, matrix++)
        if (vector & 1) sum ^= *matrix;
    return sum;
}

// The operator of one zero bit, taken to the power of the bits in STRIDE.
__attribute__((constructor)) static void prepare(void) {
    uint32_t power[32], operator[32], next[32];
    power[0] = POLYNOMIAL;
    for (int bit = 1; bit < 32; bit++) power[bit] = 1u << (bit - 1);
    for (int bit = 0; bit < 32; bit++) operator[bit] = 1u << bit;
    for (uint64_t bits = 8 * STRIDE; bits; bits >>= 1) {
        if (bits & 1) {
            for (int bit = 0; bit < 32; bit++) next[bit] = times(power, operator[bit]);
            memcpy(operator, next, sizeof next);
        }
        for (int bit = 0; bit < 32; bit++) next[bit] = times(power, power[bit]);
        memcpy(power, next, sizeof next);
    }
    for (int byte = 0; byte < 4; byte++)
        for (uint32_t value = 0; value < 256; value++)
            table[byte][value] = times(operator, value << (8 * byte));
}

static inline uint32_t shifted(uint32_t crc) {
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^
           table[3][crc >> 24];
}

FAST static inline __m128i load(const char *at) { return _mm_loadu_si128((const __m128i *)at); }
FAST static inline uint64_t low(__m128i two) { return (uint64_t)_mm_cvtsi128_si64(two); }
FAST static inline uint64_t high(__m128i two) { return (uint64_t)_mm_extract_epi64(two, 1); }

// Keeps the largest of the numbers seen so far, `width` bytes each (0: they are none) without their
// sign bits, which are in the order of their bits then.
FAST static inline __attribute__((always_inline)) __m128i largest(
    __m128i before, __m128i numbers, int width) {
    if (width == 2)
        return _mm_max_epi16(before, _mm_and_si128(numbers, _mm_set1_epi16(0x7fff)));
    if (width == 4)
        return _mm_max_epi32(before, _mm_and_si128(numbers, _mm_set1_epi32(0x7fffffff)));
    return before;
}

FAST static inline __attribute__((always_inline)) uint32_t walk(
    char *to, const char *from, size_t size, int copies, int width, __m128i *seen) {
    uint64_t crc = 0xffffffffu;
    __m128i most = _mm_setzero_si128();
    for (; copies && size && ((uintptr_t)to & 63); size--) {  // whole lines from here on
        crc = _mm_crc32_u8((uint32_t)crc, (uint8_t)*from);
        *to++ = *from++;
    }
    for (; size >= 3 * STRIDE; size -= 3 * STRIDE) {
        uint64_t second = 0, third = 0;
        for (size_t line = 0; line < STRIDE; line += 64) {
            // of the next three parts: they are too many for the processor to see where we go
            _mm_prefetch(from + 3 * STRIDE + line, _MM_HINT_T0);
            _mm_prefetch(from + 4 * STRIDE + line, _MM_HINT_T0);
            _mm_prefetch(from + 5 * STRIDE + line, _MM_HINT_T0);
#pragma GCC unroll 4
            for (size_t at = line; at < line + 64; at += 16) {
                __m128i a = load(from + at), b = load(from + STRIDE + at);
                __m128i c = load(from + 2 * STRIDE + at);
                if (copies) {
                    _mm_stream_si128((__m128i *)(to + at), a);
                    _mm_stream_si128((__m128i *)(to + STRIDE + at), b);
                    _mm_stream_si128((__m128i *)(to + 2 * STRIDE + at), c);
                }
                most = largest(largest(largest(most, a, width), b, width), c, width);
                crc = _mm_crc32_u64(crc, low(a));
                second = _mm_crc32_u64(second, low(b));
                third = _mm_crc32_u64(third, low(c));
                crc = _mm_crc32_u64(crc, high(a));
                second = _mm_crc32_u64(second, high(b));
                third = _mm_crc32_u64(third, high(c));
            }
        }
        crc = shifted(shifted((uint32_t)crc) ^ (uint32_t)second) ^ (uint32_t)third;
        from += 3 * STRIDE;
        if (copies) to += 3 * STRIDE;
    }
    for (; size >= 8; size -= 8, from += 8) {
        uint64_t word;
        memcpy(&word, from, sizeof word);
        crc = _mm_crc32_u64(crc, word);
        most = largest(most, _mm_cvtsi64_si128((long long)word), width);
        if (copies) {
            memcpy(to, &word, sizeof word);
            to += 8;
        }
    }
    for (; size; size--, from++) {
        char byte = *from;
        crc = _mm_crc32_u8((uint32_t)crc, (uint8_t)byte);
        if (copies) *to++ = byte;
    }
    *seen = most;
    return ~(uint32_t)crc;
}

FAST static void work(struct job *job) {
    const char *from = (const char *)(uintptr_t)job->source;
    char *to = (char *)(uintptr_t)job->target;
    __m128i seen;
    job->crc = to ? walk(to, from, job->size, 1, 0, &seen) : walk(to, from, job->size, 0, 0, &seen);
}

API int headrace_copying_runs_here(void) { return __builtin_cpu_supports("sse4.2") != 0; }

// Does the jobs from *next on, taking one after the other; any number of threads may call it with
// the same arguments. Who sets *next to `count` has them begin no further one.
API void headrace_copy(struct job *jobs, int64_t count, int64_t *next) {
    for (;;) {
        int64_t number = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (number >= count) break;
        work(&jobs[number]);
    }
    _mm_sfence();  // what went past the caches is seen by whoever is told that it is there
}

// Copies `size` bytes of numbers of 2 or 4 bytes each; their CRC, or -1 where one of them is above
// `most` when its sign bit is left out. `to` is a multiple of 64, `size` one of 8.
API FAST int64_t headrace_copy_numbers(char *to, const char *from, int64_t size, int32_t width,
                                       uint32_t most) {
    __m128i seen;
    uint32_t crc = width == 2 ? walk(to, from, (size_t)size, 1, 2, &seen)
                              : walk(to, from, (size_t)size, 1, 4, &seen);
    _mm_sfence();
    uint32_t found = 0;
    uint16_t narrow[8];
    uint32_t wide[4];
    memcpy(narrow, &seen, sizeof narrow);
    memcpy(wide, &seen, sizeof wide);
    for (int at = 0; at < 16 / width; at++) {
        uint32_t number = width == 2 ? narrow[at] : wide[at];
        found = number > found ? number : found;
    }
    return found > most ? -1 : (int64_t)crc;
}
