/* What the files of the compiled 4-bit code share: the work, and what each level of processor does of it. */

#ifndef LOADSTONE_FOUR_BIT_H
#define LOADSTONE_FOUR_BIT_H

#include <limits.h>
#include <stdint.h>
#include <string.h>

enum { FP32, BF16, FP16 };
enum { LEVEL_NONE, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16 };

#define INLINE static inline __attribute__((always_inline))
#define HIDDEN __attribute__((visibility("hidden")))
#define LINE 128 /* codes of a line of the cache */
#define AHEAD 4  /* outputs whose codes are fetched before they are decoded */
#define SPARE 64 /* scales that are looked up at once */
#define PANEL 4  /* outputs worked on side by side; threads share out whole panels */

/* Scales that are quantized themselves: code[byte] * absmax[block of bytes] + offset. */
typedef struct Nested {
  const uint8_t *bytes; /* null: they are not */
  const float *absmax;
  const float *code; /* (256,) */
  long blocksize;
  float offset;
  void (*expand)(const struct Nested *, long first, long count, float *out, long room);
  uint8_t planes[4][256] __attribute__((aligned(64))); /* of LEVEL_AVX512_BF16: the first bytes of ``code``, ... */
} Nested;

typedef struct {
  const void *x;        /* (rows, stride), as ``arrange`` left it */
  const uint8_t *codes; /* (outputs, width / 2), the first of two codes in the high bits */
  const float *absmax;  /* (outputs, width / blocksize), unless they are nested */
  const float *code;    /* (16,) */
  float *y;             /* (rows, outputs) */
  void *out;            /* of decoding: (outputs,) numbers of ``dtype``, or scales */
  long rows, outputs, width, stride, blocksize, dtype;
  char *scratch; /* ``share`` bytes for each thread: a panel's scales, then its decoded weights */
  long share;
  Nested nested;
} Work;

typedef struct {
  /* Numbers from ``first`` to ``last``, which are where blocks begin, or the end. */
  void (*decode)(const Work *, long first, long last);
  /* x, (rows * width,) of ``dtype``, converted and put in the order in which ``products`` reads it. */
  void (*arrange)(const Work *, const void *x, void *out);
  /* Outputs from ``first`` to ``last`` for all rows. scales, panel: room for this thread. */
  void (*products)(const Work *, long first, long last, float *scales, void *panel);
  /* Makes ``planes``; null where they are not used. */
  void (*prepare)(Nested *);
  /* Scales from the first on to ``out``, where ``room`` numbers may be written. */
  void (*expand)(const Nested *, long first, long count, float *out, long room);
  long bytes_of_x;        /* of a number, arranged */
  long rows_in_registers; /* up to which ``products`` needs no panel */
} Level;

HIDDEN extern const Level avx2, avx512, avx512_vbmi, avx512_pairs;

HIDDEN void expand_plain(const Nested *nested, long first, long count, float *out, long room);

/* The scales of ``count`` outputs from the n-th on. */
INLINE const float *scales_of(const Work *w, long n, long count, float *room) {
  const long blocks = w->width / w->blocksize;
  if (!w->nested.bytes) return w->absmax + n * blocks;
  w->nested.expand(&w->nested, n * blocks, count * blocks, room, count * blocks + SPARE);
  return room;
}

/* Bytes of a thread's scales: a panel's, and what may be written beyond them. */
INLINE long room_for_scales(long blocks) { return (PANEL * blocks + SPARE) * (long)sizeof(float) / 64 * 64 + 64; }

#endif
