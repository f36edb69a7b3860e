/* 4-bit weights decoded, and multiplied with few rows of input while they are: the codes are read once.

   The sixteen numbers of a code fit one AVX-512 register, so a permutation looks sixteen codes up at a time, or 32 of two
   bytes. Scales are folded into that table once a block, and rounded to what a weight of the input's dtype would be. With
   AVX512-BF16, bf16 inputs are multiplied in pairs. Threads are those of the OpenMP runtime that the process has loaded
   with torch; without one the caller's thread does all. */

#include <stdint.h>
#include <stdlib.h>

enum { FP32, BF16, FP16 };

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define _GNU_SOURCE
#include <dlfcn.h>
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw")))
#define PAIRS __attribute__((target("avx512f,avx512vl,avx512bw,avx512vbmi,avx512bf16")))
#define MOST 16   /* rows of x that share one decoding */
#define LINE 128  /* codes of a line of the cache */
#define AHEAD 4   /* outputs whose codes are fetched before they are decoded */
#define PANEL 4   /* outputs decoded side by side for several rows */

typedef struct {
  const void *x;        /* (rows, width), of each 32 numbers: fp32, the even ones, then the odd ones; or bf16 in pairs, as
                           ``spread`` has them */
  const uint8_t *codes; /* (outputs, width / 2), the first of two codes in the high bits */
  const float *absmax;  /* (outputs, width / blocksize) */
  const float *code;    /* (16,) */
  float *y;             /* (rows, outputs) */
  void *out;            /* of decoding: (outputs,) numbers of ``dtype``, or scales */
  long rows, outputs, width, blocksize, dtype;
  float offset;
  int (*thread)(void), (*threads)(void);
} Work;

/* 0: not here; 1: AVX-512; 2: with products of pairs of bf16 too. */
int loadstone_native(void) {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw"))
    return 0;
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? 2 : 1;
}

/* ---- Tables of a block: its sixteen numbers times its scale, rounded to the dtype ---- */

AVX512 INLINE __m512 to_bf16(__m512 numbers) {
  const __m512i bits = _mm512_castps_si512(numbers);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i kept = _mm512_and_si512(up, _mm512_set1_epi32((int)0xFFFF0000u));
  const __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(kept, nan, _mm512_set1_epi32(0x7FC00000)));
}

AVX512 INLINE __m512 rounded(__m512 numbers, long dtype) {
  if (dtype == BF16) return to_bf16(numbers);
  if (dtype == FP16) return _mm512_cvtph_ps(_mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT));
  return numbers;
}

/* Two bytes a number, twice over: an index's fifth bit does not matter then. */
AVX512 INLINE __m512i halves(__m512 numbers, long dtype) {
  const __m256i short_ = dtype == BF16 ? _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(to_bf16(numbers)), 16))
                                       : _mm512_cvtps_ph(numbers, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_broadcast_i64x4(short_);
}

/* 16 bytes of codes as 32 indices of two bytes, in order. */
AVX512 INLINE __m512i indices(const uint8_t *codes) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
  return _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
}

/* ---- Decoding ---- */

/* The numbers from ``first`` to ``last``, which are where blocks begin, or the end. */
AVX512 static void decode_between(const Work *w, long first, long last) {
  const __m512 table = _mm512_loadu_ps(w->code);
  for (long start = first; start < last; start += w->blocksize) {
    const long end = start + w->blocksize < last ? start + w->blocksize : last;
    const __m512 numbers = _mm512_mul_ps(table, _mm512_set1_ps(w->absmax[start / w->blocksize]));
    long k = start;
    if (w->dtype == FP32) {
      float *out = w->out, single[16];
      for (; k + 32 <= end; k += 32) {
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w->codes + k / 2)));
        const __m512 odd = _mm512_permutexvar_ps(pairs, numbers);
        const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), numbers);
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        _mm512_storeu_ps(out + k, _mm512_permutex2var_ps(even, low, odd));
        _mm512_storeu_ps(out + k + 16, _mm512_permutex2var_ps(even, high, odd));
      }
      if (k < end) _mm512_storeu_ps(single, numbers);
      for (; k < end; k++) out[k] = single[k % 2 ? w->codes[k / 2] & 15 : w->codes[k / 2] >> 4];
    } else {
      uint16_t *out = w->out, single[32];
      const __m512i both = halves(numbers, w->dtype);
      for (; k + 32 <= end; k += 32)
        _mm512_storeu_si512(out + k, _mm512_permutexvar_epi16(indices(w->codes + k / 2), both));
      if (k < end) _mm512_storeu_si512(single, both);
      for (; k < end; k++) out[k] = single[k % 2 ? w->codes[k / 2] & 15 : w->codes[k / 2] >> 4];
    }
  }
}

/* Scales that are quantized themselves: a table of 256 numbers, a scale for each block of them, an offset for all. */
AVX512 static void scales_between(const Work *w, long first, long last) {
  const __m512 offset = _mm512_set1_ps(w->offset);
  float *out = w->out;
  for (long k = first; k < last; k += 16) {
    const __mmask16 real = last - k < 16 ? (__mmask16)((1u << (last - k)) - 1) : 0xFFFF;
    const __m512i places = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(real, w->codes + k));
    const __m512 numbers = _mm512_mask_i32gather_ps(offset, real, places, w->code, 4);
    float each[16];
    if (k / w->blocksize == (k + 15) / w->blocksize) {
      const __m512 product = _mm512_mul_ps(numbers, _mm512_set1_ps(w->absmax[k / w->blocksize]));
      _mm512_mask_storeu_ps(out + k, real, _mm512_add_ps(product, offset));
      continue;
    }
    for (long i = k; i < last && i < k + 16; i++) each[i - k] = w->absmax[i / w->blocksize];
    _mm512_mask_storeu_ps(out + k, real, _mm512_add_ps(_mm512_mul_ps(numbers, _mm512_maskz_loadu_ps(real, each)), offset));
  }
}

/* ---- Products in fp32 ---- */

/* Of each 32 numbers the even ones, then the odd ones. */
AVX512 static void arrange(const float *x, float *out, long count) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  for (long k = 0; k < count; k += 32) {
    const __m512 low = _mm512_loadu_ps(x + k), high = _mm512_loadu_ps(x + k + 16);
    _mm512_storeu_ps(out + k, _mm512_permutex2var_ps(low, even, high));
    _mm512_storeu_ps(out + k + 16, _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high));
  }
}

/* One output for ``count`` rows. The count is a constant wherever this is inlined, so that all sums stay in registers. */
AVX512 INLINE void one_output(const Work *w, __m512 table, long n, long row, const int count) {
  const uint8_t *codes = w->codes + n * (w->width / 2);
  const float *scales = w->absmax + n * (w->width / w->blocksize);
  __m512 sums[MOST];
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) sums[i] = _mm512_setzero_ps();
  for (long start = 0; start < w->width; start += w->blocksize) {
    const __m512 scaled = rounded(_mm512_mul_ps(table, _mm512_set1_ps(*scales++)), w->dtype);
    for (long k = start; k < start + w->blocksize; k += 32, codes += 16) {
      _mm_prefetch((const char *)(codes + AHEAD * w->width / 2), _MM_HINT_T0);
      const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
      const __m512 odd = _mm512_permutexvar_ps(pairs, scaled);
      const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), scaled);
#pragma GCC unroll 16
      for (int i = 0; i < count; i++) {
        const float *x = (const float *)w->x + (row + i) * w->width + k;
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

/* ---- Products of pairs of bf16 ---- */

/* The 32 codes of 16 bytes as indices of two bytes: of each half of the bytes four at a time, in turns. An index's fifth
   bit, the next code's, does not matter. */
PAIRS INLINE __m512i spread(const uint8_t *codes) {
#define FOUR(first) (first + 4LL) | (first + 0LL) << 16 | (first + 12LL) << 32 | (first + 8LL) << 48
  const __m512i bits = _mm512_setr_epi64(FOUR(0), FOUR(0), FOUR(16), FOUR(16), FOUR(32), FOUR(32), FOUR(48), FOUR(48));
#undef FOUR
  return _mm512_multishift_epi64_epi8(bits, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codes)));
}

/* Inputs in the order of ``spread``: of each 32 the first four of each half, then the next four. */
PAIRS static void arrange_pairs(const uint16_t *x, uint16_t *out, long count) {
  const __m512i eights = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (long k = 0; k < count; k += 32)
    _mm512_storeu_si512(out + k, _mm512_permutexvar_epi64(eights, _mm512_loadu_si512(x + k)));
}

PAIRS INLINE __m512i bf16_table(__m512 table, float scale) {
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(table, _mm512_set1_ps(scale))));
}

/* ``across`` outputs for ``count`` rows, decoded in registers. */
PAIRS INLINE void decode_and_multiply(const Work *w, __m512 table, long n, long row, const int across, const int count) {
  const uint16_t *x = (const uint16_t *)w->x + row * w->width;
  const long blocks = w->width / w->blocksize;
  __m512 sums[PANEL][4];
#pragma GCC unroll 4
  for (int j = 0; j < across; j++)
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) sums[j][i] = _mm512_setzero_ps();
  for (long block = 0; block < blocks; block++) {
    __m512i tables[PANEL];
#pragma GCC unroll 4
    for (int j = 0; j < across; j++) {
      const float *scale = w->absmax + (n + j) * blocks + block;
      _mm_prefetch((const char *)(scale + AHEAD * blocks), _MM_HINT_T0);
      tables[j] = bf16_table(table, *scale);
    }
    for (long k = block * w->blocksize; k < (block + 1) * w->blocksize; k += 32) {
#pragma GCC unroll 4
      for (int j = 0; j < across; j++) {
        const uint8_t *codes = w->codes + (n + j) * (w->width / 2) + k / 2;
        if (k % LINE == 0) _mm_prefetch((const char *)(codes + AHEAD * w->width / 2), _MM_HINT_T0);
        const __m512bh numbers = (__m512bh)_mm512_permutexvar_epi16(spread(codes), tables[j]);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++)
          sums[j][i] = _mm512_dpbf16_ps(sums[j][i], numbers, (__m512bh)_mm512_loadu_si512(x + i * w->width + k));
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < across; j++)
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) w->y[(row + i) * w->outputs + n + j] = _mm512_reduce_add_ps(sums[j][i]);
}

/* A panel of outputs, decoded side by side, for ``count`` rows. */
PAIRS INLINE void multiply(const Work *w, const uint16_t *panel, long n, long row, const int count) {
  const uint16_t *x = (const uint16_t *)w->x + row * w->width;
  __m512 sums[PANEL][6];
#pragma GCC unroll 4
  for (int j = 0; j < PANEL; j++)
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) sums[j][i] = _mm512_setzero_ps();
  for (long k = 0; k < w->width; k += 32) {
    __m512bh numbers[PANEL];
#pragma GCC unroll 4
    for (int j = 0; j < PANEL; j++) numbers[j] = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + j * 32);
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) {
      const __m512bh inputs = (__m512bh)_mm512_loadu_si512(x + i * w->width + k);
#pragma GCC unroll 4
      for (int j = 0; j < PANEL; j++) sums[j][i] = _mm512_dpbf16_ps(sums[j][i], numbers[j], inputs);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < PANEL; j++)
#pragma GCC unroll 6
    for (int i = 0; i < count; i++) w->y[(row + i) * w->outputs + n + j] = _mm512_reduce_add_ps(sums[j][i]);
}

PAIRS INLINE void panel_of(const Work *w, __m512 table, long n, uint16_t *panel) {
  const long blocks = w->width / w->blocksize;
  for (int j = 0; j < PANEL; j++) {
    const uint8_t *codes = w->codes + (n + j) * (w->width / 2);
    for (long block = 0; block < blocks; block++) {
      const __m512i both = bf16_table(table, w->absmax[(n + j) * blocks + block]);
      for (long k = block * w->blocksize; k < (block + 1) * w->blocksize; k += 32) {
        if (k % LINE == 0) _mm_prefetch((const char *)(codes + (AHEAD * w->width + k) / 2), _MM_HINT_T0);
        _mm512_storeu_si512(panel + k * PANEL + j * 32, _mm512_permutexvar_epi16(spread(codes + k / 2), both));
      }
    }
  }
}

/* Rows in groups that fill the registers and leave no group of one or two. */
PAIRS INLINE void rows_of_panel(const Work *w, const uint16_t *panel, long n) {
  long row = 0;
  for (; w->rows - row >= 9 || w->rows - row == 6; row += 6) multiply(w, panel, n, row, 6);
  if (w->rows - row >= 7) multiply(w, panel, n, row, 4), row += 4;
  if (w->rows - row == 5) multiply(w, panel, n, row, 5);
  if (w->rows - row == 4) multiply(w, panel, n, row, 4);
  if (w->rows - row == 3) multiply(w, panel, n, row, 3);
}

PAIRS INLINE void few_rows(const Work *w, __m512 table, long n, const int across) {
  if (w->rows == 1) decode_and_multiply(w, table, n, 0, across, 1);
  if (w->rows == 2) decode_and_multiply(w, table, n, 0, across, 2);
  if (w->rows == 3) decode_and_multiply(w, table, n, 0, across, 3);
  if (w->rows == 4) decode_and_multiply(w, table, n, 0, across, 4);
}

PAIRS static void outputs_in_pairs(const Work *w, long first, long last) {
  const __m512 table = _mm512_loadu_ps(w->code);
  long n = first;
  if (w->rows <= 4) {
    for (; n + PANEL <= last; n += PANEL) few_rows(w, table, n, PANEL);
    for (; n < last; n++) few_rows(w, table, n, 1);
    return;
  }
  uint16_t *panel = aligned_alloc(64, (size_t)w->width * PANEL * sizeof *panel);
  for (; n + PANEL <= last && panel; n += PANEL) {
    panel_of(w, table, n, panel);
    rows_of_panel(w, panel, n);
  }
  free(panel);
  for (; n < last; n++)
    for (long row = 0; row < w->rows; row++) decode_and_multiply(w, table, n, row, 1, 1);
}

/* ---- Threads ---- */

static void share_of_outputs(void *data) {
  const Work *w = data;
  const long me = w->thread(), all = w->threads();
  outputs_between(w, w->outputs * me / all, w->outputs * (me + 1) / all);
}

static void share_of_pairs(void *data) {
  const Work *w = data;
  const long me = w->thread(), all = w->threads(), panels = (w->outputs + PANEL - 1) / PANEL;
  const long last = PANEL * (panels * (me + 1) / all);
  outputs_in_pairs(w, PANEL * (panels * me / all), last < w->outputs ? last : w->outputs);
}

static void share_of_numbers(void *data) {
  const Work *w = data;
  const long me = w->thread(), all = w->threads(), blocks = (w->outputs + w->blocksize - 1) / w->blocksize;
  const long last = w->blocksize * (blocks * (me + 1) / all);
  decode_between(w, w->blocksize * (blocks * me / all), last < w->outputs ? last : w->outputs);
}

static void share_of_scales(void *data) {
  const Work *w = data;
  const long me = w->thread(), all = w->threads(), parts = (w->outputs + 15) / 16;
  const long last = 16 * (parts * (me + 1) / all);
  scales_between(w, 16 * (parts * me / all), last < w->outputs ? last : w->outputs);
}

static int only_one(void) { return 1; }
static int the_first(void) { return 0; }

static void in_threads(void (*share)(void *), Work *work, long threads) {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = 0;
  *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  *(void **)&work->thread = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
  *(void **)&work->threads = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  if (threads > 1 && parallel && work->thread && work->threads) {
    parallel(share, work, (unsigned)threads, 0);
  } else {
    work->thread = the_first, work->threads = only_one;
    share(work);
  }
}

/* room: as large as x, for its numbers in another order. */
void loadstone_linear_4bit(const void *x, void *room, const uint8_t *codes, const float *absmax, const float *code, float *y,
                           long rows, long outputs, long width, long blocksize, long dtype, long pairs, long threads) {
  if (pairs) arrange_pairs(x, room, rows * width);
  else arrange(x, room, rows * width);
  Work work = {room, codes, absmax, code, y, 0, rows, outputs, width, blocksize, dtype, 0, 0, 0};
  in_threads(pairs ? share_of_pairs : share_of_outputs, &work, threads);
}

void loadstone_dequantize_4bit(const uint8_t *codes, const float *absmax, const float *code, void *out, long count,
                               long blocksize, long dtype, long threads) {
  Work work = {0, codes, absmax, code, 0, out, 0, count, 0, blocksize, dtype, 0, 0, 0};
  in_threads(share_of_numbers, &work, threads);
}

void loadstone_dequantize_absmax(const uint8_t *codes, const float *absmax, const float *code, float *out, float offset,
                                 long count, long blocksize, long threads) {
  Work work = {0, codes, absmax, code, 0, out, 0, count, 0, blocksize, FP32, offset, 0, 0};
  in_threads(share_of_scales, &work, threads);
}
#else
int loadstone_native(void) { return 0; }
#endif
