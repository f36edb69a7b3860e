/* The 4-bit code for AVX2, FMA and F16C, in fp32: numbers are looked up, converted to fp32 and multiplied.

   Of numbers of two bytes a table is two planes of sixteen bytes, in each of which a shuffle looks 32 codes up at a time. Of
   fp32 it is two registers of eight numbers. As on AVX-512, scales are folded into the table once a block, and rounded to
   what a weight of the input's dtype would be. */

#include "four_bit.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define EIGHT 8 /* rows of x that share one decoding */

typedef struct {
  __m256 low, high;      /* fp32: the first eight numbers of the code, and the others */
  __m256i bottom, above; /* of two bytes: the low byte of each number, twice over, and the high byte */
} Table;

/* ---- Tables of a block: its sixteen numbers times its scale, rounded to the dtype ---- */

/* bf16, in the high half of each number. */
AVX2 INLINE __m256i to_bf16(__m256 numbers) {
  const __m256i bits = _mm256_castps_si256(numbers);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256 nan = _mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(up), quiet, nan));
}

/* The sixteen numbers, two bytes each, in order. */
AVX2 INLINE __m256i narrowed(__m256 low, __m256 high, const long dtype) {
  if (dtype == FP16) {
    const __m128i first = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), 1);
  }
  const __m256i first = _mm256_srli_epi32(to_bf16(low), 16), second = _mm256_srli_epi32(to_bf16(high), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), _MM_SHUFFLE(3, 1, 2, 0));
}

AVX2 INLINE Table table_of(const float *code, float scale, const long dtype) {
  const __m256 factor = _mm256_set1_ps(scale);
  Table table;
  table.low = _mm256_mul_ps(_mm256_loadu_ps(code), factor), table.high = _mm256_mul_ps(_mm256_loadu_ps(code + 8), factor);
  if (dtype == FP32) return table;
  const __m256i numbers = narrowed(table.low, table.high, dtype);
  const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(numbers, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16(numbers, 8));
  table.bottom = _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(2, 0, 2, 0));
  table.above = _mm256_permute4x64_epi64(bytes, _MM_SHUFFLE(3, 1, 3, 1));
  return table;
}

/* The numbers of eight places, of which the low three bits choose in each half; the sign of ``upper`` chooses the half. */
AVX2 INLINE __m256 looked_up(Table table, __m256i places, __m256i upper) {
  const __m256 low = _mm256_permutevar8x32_ps(table.low, places), high = _mm256_permutevar8x32_ps(table.high, places);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(upper));
}

/* The numbers of 8 bytes of codes: the even ones, and the odd ones. */
AVX2 INLINE void even_and_odd(Table table, const uint8_t *codes, __m256 *even, __m256 *odd) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
  *even = looked_up(table, _mm256_srli_epi32(bytes, 4), _mm256_slli_epi32(bytes, 24));
  *odd = looked_up(table, bytes, _mm256_slli_epi32(bytes, 28));
}

/* ---- Decoding ---- */

AVX2 INLINE void decode_32(Table table, const uint8_t *codes, void *out, const long dtype) {
  if (dtype == FP32) {
    for (int half = 0; half < 2; half++) {
      float *to = (float *)out + 16 * half;
      __m256 even, odd;
      even_and_odd(table, codes + 8 * half, &even, &odd);
      const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
      _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
      _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
    return;
  }
  const __m128i bytes = _mm_loadu_si128((const __m128i *)codes), four = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), four), odd = _mm_and_si128(bytes, four);
  const __m256i places =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(even, odd)), _mm_unpackhi_epi8(even, odd), 1);
  const __m256i bottom = _mm256_shuffle_epi8(table.bottom, places), above = _mm256_shuffle_epi8(table.above, places);
  const __m256i low = _mm256_unpacklo_epi8(bottom, above), high = _mm256_unpackhi_epi8(bottom, above);
  _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(low, high, 0x20));
  _mm256_storeu_si256((__m256i *)out + 1, _mm256_permute2x128_si256(low, high, 0x31));
}

AVX2 INLINE void decode_as(const Work *w, long first, long last, const long dtype) {
  const int size = dtype == FP32 ? 4 : 2;
  for (long start = first; start < last; start += w->blocksize) {
    const long end = start + w->blocksize < last ? start + w->blocksize : last;
    const Table table = table_of(w->code, w->absmax[start / w->blocksize], dtype);
    long k = start;
    for (; k + 32 <= end; k += 32) decode_32(table, w->codes + k / 2, (char *)w->out + k * size, dtype);
    if (k == end) continue;
    uint8_t codes[16] = {0};
    char numbers[32 * sizeof(float)];
    memcpy(codes, w->codes + k / 2, (size_t)(end - k + 1) / 2);
    decode_32(table, codes, numbers, dtype);
    memcpy((char *)w->out + k * size, numbers, (size_t)((end - k) * size));
  }
}

AVX2 static void decode_between(const Work *w, long first, long last) {
  if (w->dtype == FP32) decode_as(w, first, last, FP32);
  if (w->dtype == BF16) decode_as(w, first, last, BF16);
  if (w->dtype == FP16) decode_as(w, first, last, FP16);
}

/* ---- Products ---- */

/* 32 numbers of 16 bytes of codes as fp32. Which come together is what costs least: of each 16 of bf16 every fourth from
   the first on and every fourth from the second on, then from the third and the fourth on; else the even ones and the
   odd ones. */
AVX2 INLINE void numbers_of(Table table, const uint8_t *codes, __m256 numbers[4], const long dtype) {
  if (dtype == FP32) {
    even_and_odd(table, codes, numbers, numbers + 1);
    even_and_odd(table, codes + 8, numbers + 2, numbers + 3);
    return;
  }
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)codes));
  const __m256i shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0));
  const __m256i places = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
  const __m256i bottom = _mm256_shuffle_epi8(table.bottom, places), above = _mm256_shuffle_epi8(table.above, places);
  const __m256i both[2] = {_mm256_unpacklo_epi8(bottom, above), _mm256_unpackhi_epi8(bottom, above)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    if (dtype == BF16) {
      numbers[2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(both[i], 16));
      numbers[2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(both[i], _mm256_set1_epi32((int)0xFFFF0000u)));
    } else {
      numbers[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(both[i]));
      numbers[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(both[i], 1));
    }
  }
}

AVX2 INLINE __m256 eight(const void *x, long k, long dtype) {
  if (dtype == FP32) return _mm256_loadu_ps((const float *)x + k);
  const __m128i numbers = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + k));
  if (dtype == FP16) return _mm256_cvtph_ps(numbers);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16));
}

/* fp32, in the order of ``numbers_of``. */
AVX2 static void arrange(const Work *w, const void *x, void *room) {
  const __m256i twos = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7), pairs = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (long row = 0; row < w->rows; row++) {
    float *out = (float *)room + row * w->stride;
    for (long k = 0; k < w->width; k += 16) {
      const __m256 low = eight(x, row * w->width + k, w->dtype), high = eight(x, row * w->width + k + 8, w->dtype);
      const __m256 even = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)), twos);
      const __m256 odd = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1)), twos);
      if (w->dtype == BF16) {
        const __m256 first = _mm256_permutevar8x32_ps(even, pairs), second = _mm256_permutevar8x32_ps(odd, pairs);
        _mm256_storeu_ps(out + k, _mm256_permute2f128_ps(first, second, 0x20));
        _mm256_storeu_ps(out + k + 8, _mm256_permute2f128_ps(first, second, 0x31));
      } else {
        _mm256_storeu_ps(out + k, even);
        _mm256_storeu_ps(out + k + 8, odd);
      }
    }
  }
}

AVX2 INLINE float sum_of(__m256 eight) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* One output for ``count`` rows, a constant wherever this is inlined: eight sums, or four of one row, so that no addition
   waits for the one before it. */
AVX2 INLINE void one_output(const Work *w, const float *scales, long n, long row, const int count, const long dtype) {
  const uint8_t *codes = w->codes + n * (w->width / 2);
  const float *x = (const float *)w->x + row * w->stride;
  const int apart = count == 1 ? 4 : EIGHT / count; /* sums of a row */
  __m256 sums[EIGHT];
#pragma GCC unroll 8
  for (int i = 0; i < count * apart; i++) sums[i] = _mm256_setzero_ps();
  for (long start = 0; start < w->width; start += w->blocksize) {
    const Table table = table_of(w->code, *scales++, dtype);
    for (long k = start; k < start + w->blocksize; k += 32) {
      __m256 numbers[4];
      if (k % LINE == 0) _mm_prefetch((const char *)(codes + (AHEAD * w->width + k) / 2), _MM_HINT_T0);
      numbers_of(table, codes + k / 2, numbers, dtype);
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
          const __m256 inputs = _mm256_loadu_ps(x + i * w->stride + k + 8 * part);
          __m256 *sum = sums + i * apart + part % apart;
          *sum = _mm256_fmadd_ps(numbers[part], inputs, *sum);
        }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < count; i++) {
    __m256 sum = sums[i * apart];
#pragma GCC unroll 4
    for (int j = 1; j < apart; j++) sum = _mm256_add_ps(sum, sums[i * apart + j]);
    w->y[(row + i) * w->outputs + n] = sum_of(sum);
  }
}

AVX2 INLINE void products_as(const Work *w, long first, long last, float *room, const long dtype) {
  const long blocks = w->width / w->blocksize;
  for (long n = first; n < last; n += PANEL) {
    const int across = last - n < PANEL ? (int)(last - n) : PANEL;
    const float *scales = scales_of(w, n, across, room);
    for (int j = 0; j < across; j++, scales += blocks) {
      long row = 0;
      for (; w->rows - row >= EIGHT; row += EIGHT) one_output(w, scales, n + j, row, EIGHT, dtype);
      if (w->rows - row >= 4) one_output(w, scales, n + j, row, 4, dtype), row += 4;
      if (w->rows - row >= 2) one_output(w, scales, n + j, row, 2, dtype), row += 2;
      if (w->rows - row == 1) one_output(w, scales, n + j, row, 1, dtype);
    }
  }
}

AVX2 static void products(const Work *w, long first, long last, float *room, void *panel) {
  (void)panel;
  if (w->dtype == FP32) products_as(w, first, last, room, FP32);
  if (w->dtype == BF16) products_as(w, first, last, room, BF16);
  if (w->dtype == FP16) products_as(w, first, last, room, FP16);
}

const Level avx2 = {decode_between, arrange, products, 0, expand_plain, sizeof(float), LONG_MAX};
#endif
