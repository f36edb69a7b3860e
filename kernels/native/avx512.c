/* The 4-bit code for AVX-512. The sixteen numbers of a code fit one register, so a permutation looks sixteen codes up at a
   time, or 32 of two bytes. Scales are folded into that table once a block, and rounded to what a weight of the input's
   dtype would be. With AVX512-BF16, bf16 inputs are multiplied in pairs; with AVX512-VBMI, nested scales are looked up 64
   at a time, a byte of each in a permutation. */

#include "four_bit.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <immintrin.h>

#define AVX512 __attribute__((target("avx512f,avx512vl,avx512bw")))
#define PAIRS __attribute__((target("avx512f,avx512vl,avx512bw,avx512vbmi,avx512bf16")))
#define MOST 16             /* rows of x that share one decoding */
#define MOST_IN_REGISTERS 4 /* rows of pairs, beyond which a panel is decoded first */

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

/* ---- Nested scales ---- */

PAIRS static void cut_in_planes(Nested *nested) {
  for (int k = 0; k < 256; k += 16) {
    const __m512i numbers = _mm512_loadu_si512(nested->code + k);
    _mm_store_si128((__m128i *)(nested->planes[0] + k), _mm512_cvtepi32_epi8(numbers));
    _mm_store_si128((__m128i *)(nested->planes[1] + k), _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, 8)));
    _mm_store_si128((__m128i *)(nested->planes[2] + k), _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, 16)));
    _mm_store_si128((__m128i *)(nested->planes[3] + k), _mm512_cvtepi32_epi8(_mm512_srli_epi32(numbers, 24)));
  }
}

PAIRS INLINE __m512i byte_of(const uint8_t *plane, __m512i places) {
  const __m512i *quarters = (const __m512i *)plane;
  const __m512i low = _mm512_permutex2var_epi8(quarters[0], places, quarters[1]);
  const __m512i high = _mm512_permutex2var_epi8(quarters[2], places, quarters[3]);
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(places), low, high);
}

/* Up to 64 scales of one block of bytes; with ``all`` 64 numbers are written. */
PAIRS INLINE void expand_64(const Nested *nested, const uint8_t *bytes, __m512 scale, float *out, long count, int all) {
  const __mmask64 real = count < 64 ? (1ULL << count) - 1 : ~0ULL;
  /* Interleaving works on quarters of a register: the fours of bytes are dealt out to them. */
  const __m512i dealt = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i places = _mm512_permutexvar_epi32(dealt, _mm512_maskz_loadu_epi8(real, bytes));
  const __m512i first = byte_of(nested->planes[0], places), second = byte_of(nested->planes[1], places);
  const __m512i third = byte_of(nested->planes[2], places), fourth = byte_of(nested->planes[3], places);
  const __m512i halves[4] = {_mm512_unpacklo_epi8(first, second), _mm512_unpackhi_epi8(first, second),
                             _mm512_unpacklo_epi8(third, fourth), _mm512_unpackhi_epi8(third, fourth)};
  const __m512i numbers[4] = {
      _mm512_unpacklo_epi16(halves[0], halves[2]), _mm512_unpackhi_epi16(halves[0], halves[2]),
      _mm512_unpacklo_epi16(halves[1], halves[3]), _mm512_unpackhi_epi16(halves[1], halves[3])};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512 product = _mm512_mul_ps(_mm512_castsi512_ps(numbers[i]), scale);
    const __m512 sum = _mm512_add_ps(product, _mm512_set1_ps(nested->offset));
    if (all) _mm512_storeu_ps(out + 16 * i, sum);
    else _mm512_mask_storeu_ps(out + 16 * i, (__mmask16)(real >> 16 * i), sum);
  }
}

PAIRS static void expand_permuted(const Nested *nested, long first, long count, float *out, long room) {
  const float *absmax = nested->absmax + first / nested->blocksize;
  long end = nested->blocksize - first % nested->blocksize;
  for (long k = 0; k < count; k = end, end += nested->blocksize) {
    const __m512 scale = _mm512_set1_ps(*absmax++);
    if (end > count) end = count;
    for (long i = k; i < end; i += 64) {
      const uint8_t *bytes = nested->bytes + first + i;
      if (i + 64 <= room) expand_64(nested, bytes, scale, out + i, end - i, 1); /* masks are slow to store with */
      else expand_64(nested, bytes, scale, out + i, end - i, 0);
    }
  }
}

/* ---- Products in fp32 ---- */

AVX512 INLINE __m512 sixteen(const void *x, long k, long dtype) {
  if (dtype == FP32) return _mm512_loadu_ps((const float *)x + k);
  const __m256i numbers = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + k));
  if (dtype == FP16) return _mm512_cvtph_ps(numbers);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

/* fp32, of each 32 numbers the even ones, then the odd ones. */
AVX512 static void arrange(const Work *w, const void *x, void *room) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (long row = 0; row < w->rows; row++) {
    float *out = (float *)room + row * w->stride;
    for (long k = 0; k < w->width; k += 32) {
      const __m512 low = sixteen(x, row * w->width + k, w->dtype), high = sixteen(x, row * w->width + k + 16, w->dtype);
      _mm512_storeu_ps(out + k, _mm512_permutex2var_ps(low, even, high));
      _mm512_storeu_ps(out + k + 16, _mm512_permutex2var_ps(low, odd, high));
    }
  }
}

/* One output for ``count`` rows. The count is a constant wherever this is inlined, so that all sums stay in registers; of
   few rows there are several for each, so that no addition waits for the one before it. */
AVX512 INLINE void one_output(const Work *w, __m512 table, const float *scales, long n, long row, const int count) {
  const uint8_t *codes = w->codes + n * (w->width / 2);
  const float *x = (const float *)w->x + row * w->stride;
  const int apart = count >= 8 ? 1 : 2; /* sums of a row */
  __m512 sums[MOST];
#pragma GCC unroll 16
  for (int i = 0; i < count * apart; i++) sums[i] = _mm512_setzero_ps();
  for (long start = 0; start < w->width; start += w->blocksize) {
    const __m512 scaled = rounded(_mm512_mul_ps(table, _mm512_set1_ps(*scales++)), w->dtype);
    for (long k = start; k < start + w->blocksize; k += 32) {
      if (k % LINE == 0) _mm_prefetch((const char *)(codes + (AHEAD * w->width + k) / 2), _MM_HINT_T0);
      const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + k / 2)));
      const __m512 odd = _mm512_permutexvar_ps(pairs, scaled);
      const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), scaled);
#pragma GCC unroll 16
      for (int i = 0; i < count; i++) {
        const float *inputs = x + i * w->stride + k;
        __m512 *sum = sums + i * apart;
        sum[0] = _mm512_fmadd_ps(even, _mm512_loadu_ps(inputs), sum[0]);
        sum[apart > 1] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(inputs + 16), sum[apart > 1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) {
    __m512 sum = sums[i * apart];
#pragma GCC unroll 4
    for (int j = 1; j < apart; j++) sum = _mm512_add_ps(sum, sums[i * apart + j]);
    w->y[(row + i) * w->outputs + n] = _mm512_reduce_add_ps(sum);
  }
}

AVX512 static void products(const Work *w, long first, long last, float *room, void *panel) {
  (void)panel;
  const __m512 table = _mm512_loadu_ps(w->code);
  for (long n = first; n < last; n++) {
    const float *scales = scales_of(w, n, 1, room);
    long row = 0;
    for (; w->rows - row >= MOST; row += MOST) one_output(w, table, scales, n, row, MOST);
    if (w->rows - row >= 8) one_output(w, table, scales, n, row, 8), row += 8;
    if (w->rows - row >= 4) one_output(w, table, scales, n, row, 4), row += 4;
    if (w->rows - row >= 2) one_output(w, table, scales, n, row, 2), row += 2;
    if (w->rows - row >= 1) one_output(w, table, scales, n, row, 1);
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
PAIRS static void arrange_pairs(const Work *w, const void *x, void *room) {
  const __m512i eights = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (long row = 0; row < w->rows; row++)
    for (long k = 0; k < w->width; k += 32) {
      const __m512i numbers = _mm512_loadu_si512((const uint16_t *)x + row * w->width + k);
      _mm512_storeu_si512((uint16_t *)room + row * w->stride + k, _mm512_permutexvar_epi64(eights, numbers));
    }
}

PAIRS INLINE __m512i bf16_table(__m512 table, float scale) {
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(table, _mm512_set1_ps(scale))));
}

/* ``across`` outputs for ``count`` rows, decoded in registers. */
PAIRS INLINE void decode_and_multiply(const Work *w, __m512 table, const float *scales, long n, const int across,
                                      const int count) {
  const uint16_t *x = w->x;
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
      const float *scale = scales + j * blocks + block;
      if (!w->nested.bytes) _mm_prefetch((const char *)(scale + AHEAD * blocks), _MM_HINT_T0);
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
          sums[j][i] = _mm512_dpbf16_ps(sums[j][i], numbers, (__m512bh)_mm512_loadu_si512(x + i * w->stride + k));
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < across; j++)
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) w->y[i * w->outputs + n + j] = _mm512_reduce_add_ps(sums[j][i]);
}

/* A panel of outputs, decoded side by side, for ``count`` rows; the first ``across`` of them are kept. */
PAIRS INLINE void multiply(const Work *w, const uint16_t *panel, long n, const int across, long row, const int count) {
  const uint16_t *x = (const uint16_t *)w->x + row * w->stride;
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
      const __m512bh inputs = (__m512bh)_mm512_loadu_si512(x + i * w->stride + k);
#pragma GCC unroll 4
      for (int j = 0; j < PANEL; j++) sums[j][i] = _mm512_dpbf16_ps(sums[j][i], numbers[j], inputs);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < PANEL; j++)
#pragma GCC unroll 6
    for (int i = 0; i < count; i++)
      if (j < across) w->y[(row + i) * w->outputs + n + j] = _mm512_reduce_add_ps(sums[j][i]);
}

/* Where there are fewer outputs than a panel has room for, the last of them fills it. */
PAIRS INLINE void panel_of(const Work *w, __m512 table, const float *scales, long n, const int across, uint16_t *panel) {
  const long blocks = w->width / w->blocksize;
  for (int j = 0; j < PANEL; j++) {
    const int from = j < across ? j : across - 1;
    const uint8_t *codes = w->codes + (n + from) * (w->width / 2);
    for (long block = 0; block < blocks; block++) {
      const __m512i both = bf16_table(table, scales[from * blocks + block]);
      for (long k = block * w->blocksize; k < (block + 1) * w->blocksize; k += 32) {
        if (k % LINE == 0) _mm_prefetch((const char *)(codes + (AHEAD * w->width + k) / 2), _MM_HINT_T0);
        _mm512_storeu_si512(panel + k * PANEL + j * 32, _mm512_permutexvar_epi16(spread(codes + k / 2), both));
      }
    }
  }
}

/* Rows in groups that fill the registers and leave no group of one or two. */
PAIRS INLINE void rows_of_panel(const Work *w, const uint16_t *panel, long n, const int across) {
  long row = 0;
  for (; w->rows - row >= 9 || w->rows - row == 6; row += 6) multiply(w, panel, n, across, row, 6);
  if (w->rows - row >= 7) multiply(w, panel, n, across, row, 4), row += 4;
  if (w->rows - row == 5) multiply(w, panel, n, across, row, 5);
  if (w->rows - row == 4) multiply(w, panel, n, across, row, 4);
  if (w->rows - row == 3) multiply(w, panel, n, across, row, 3);
}

PAIRS INLINE void few_rows(const Work *w, __m512 table, const float *scales, long n, const int across) {
  if (w->rows == 1) decode_and_multiply(w, table, scales, n, across, 1);
  if (w->rows == 2) decode_and_multiply(w, table, scales, n, across, 2);
  if (w->rows == 3) decode_and_multiply(w, table, scales, n, across, 3);
  if (w->rows == 4) decode_and_multiply(w, table, scales, n, across, 4);
}

PAIRS static void products_of_pairs(const Work *w, long first, long last, float *room, void *panel) {
  const __m512 table = _mm512_loadu_ps(w->code);
  for (long n = first; n < last; n += PANEL) {
    const int across = last - n < PANEL ? (int)(last - n) : PANEL;
    const float *scales = scales_of(w, n, across, room);
    if (w->rows > MOST_IN_REGISTERS) {
      panel_of(w, table, scales, n, across, panel);
      if (across == PANEL) rows_of_panel(w, panel, n, PANEL);
      else rows_of_panel(w, panel, n, across);
    } else if (across == PANEL) {
      few_rows(w, table, scales, n, PANEL);
    } else {
      for (int j = 0; j < across; j++) few_rows(w, table, scales + j * (w->width / w->blocksize), n + j, 1);
    }
  }
}

const Level avx512 = {decode_between, arrange, products, 0, expand_plain, sizeof(float), LONG_MAX};
const Level avx512_vbmi = {decode_between, arrange, products, cut_in_planes, expand_permuted, sizeof(float), LONG_MAX};
const Level avx512_pairs = {decode_between,  arrange_pairs,    products_of_pairs, cut_in_planes,
                            expand_permuted, sizeof(uint16_t), MOST_IN_REGISTERS};
#endif
