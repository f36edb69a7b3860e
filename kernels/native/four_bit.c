/* 4-bit weights multiplied with few rows of fp32 input, decoded in registers: the weight is read once, as codes.

   The sixteen numbers of a code fit one AVX-512 register, so a permutation looks sixteen codes up at a time. Threads are
   those of the OpenMP runtime that the process has loaded with torch; without one the caller's thread does all. */

#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define _GNU_SOURCE
#include <dlfcn.h>
#include <immintrin.h>

#define MOST 16 /* rows of x that share one decoding */

typedef struct {
  const float *x;       /* (rows, width): of each 32 numbers first those of even place, then those of odd place */
  const uint8_t *codes; /* (outputs, width / 2), the first of two codes in the high bits */
  const float *absmax;  /* (outputs, width / blocksize) */
  const float *code;    /* (16,) */
  float *y;             /* (rows, outputs) */
  long rows, outputs, width, blocksize, rounding;
  int (*thread)(void), (*threads)(void);
} Work;

int loadstone_native(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
}

#define AVX512 __attribute__((target("avx512f,avx512vl")))

/* To what a weight of the input's dtype would be: 0 fp32, 1 bf16, 2 fp16; to nearest, ties to even. */
AVX512 static inline __m512 rounded(__m512 numbers, long rounding) {
  if (rounding == 1) {
    const __m512i bits = _mm512_castps_si512(numbers);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32((int)0xFFFF0000u)));
  }
  if (rounding == 2) return _mm512_cvtph_ps(_mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT));
  return numbers;
}

/* One output for ``count`` rows. The count is a constant wherever this is inlined, so that all sums stay in registers. */
AVX512 static inline __attribute__((always_inline)) void one_output(const Work *w, __m512 table, long n, long row,
                                                                    const int count) {
  const uint8_t *codes = w->codes + n * (w->width / 2);
  const float *scales = w->absmax + n * (w->width / w->blocksize);
  __m512 sums[MOST];
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) sums[i] = _mm512_setzero_ps();
  for (long start = 0; start < w->width; start += w->blocksize) {
    const __m512 scaled = rounded(_mm512_mul_ps(table, _mm512_set1_ps(*scales++)), w->rounding);
    for (long k = start; k < start + w->blocksize; k += 32, codes += 16) {
      const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
      const __m512 odd = _mm512_permutexvar_ps(pairs, scaled);
      const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), scaled);
#pragma GCC unroll 16
      for (int i = 0; i < count; i++) {
        const float *x = w->x + (row + i) * w->width + k;
        sums[i] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sums[i]);
        sums[i] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), sums[i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) w->y[(row + i) * w->outputs + n] = _mm512_reduce_add_ps(sums[i]);
}

AVX512 static void outputs_between(const Work *w, long first, long last) {
  const __m512 table = _mm512_loadu_ps(w->code);
  for (long n = first; n < last; n++) {
    long row = 0;
    for (; w->rows - row >= MOST; row += MOST) one_output(w, table, n, row, MOST);
    if (w->rows - row >= 8) one_output(w, table, n, row, 8), row += 8;
    if (w->rows - row >= 4) one_output(w, table, n, row, 4), row += 4;
    if (w->rows - row >= 2) one_output(w, table, n, row, 2), row += 2;
    if (w->rows - row >= 1) one_output(w, table, n, row, 1);
  }
}

static void share(void *data) {
  const Work *w = data;
  const long me = w->thread(), all = w->threads();
  outputs_between(w, w->outputs * me / all, w->outputs * (me + 1) / all);
}

void loadstone_linear_4bit(const float *x, const uint8_t *codes, const float *absmax, const float *code, float *y,
                           long rows, long outputs, long width, long blocksize, long rounding, long threads) {
  Work work = {x, codes, absmax, code, y, rows, outputs, width, blocksize, rounding, 0, 0};
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = 0;
  *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  *(void **)&work.thread = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
  *(void **)&work.threads = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  if (threads > 1 && parallel && work.thread && work.threads)
    parallel(share, &work, (unsigned)threads, 0);
  else
    outputs_between(&work, 0, outputs);
}
#else
int loadstone_native(void) { return 0; }
void loadstone_linear_4bit(const float *x, const uint8_t *codes, const float *absmax, const float *code, float *y,
                           long rows, long outputs, long width, long blocksize, long rounding, long threads) {}
#endif
