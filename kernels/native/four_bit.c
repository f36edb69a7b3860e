/* 4-bit weights decoded, and multiplied with few rows of input while they are: the codes are read once.

   Here are the calls, their memory and their threads, which are those of the OpenMP runtime that the process has loaded
   with torch; without one the caller's thread does all. avx512.c and avx2.c do the work; which of them is said by the
   caller, who asks ``loadstone_native`` what this processor has. */

#define _GNU_SOURCE
#include "four_bit.h"

/* Of the calls below; it changes when one of them does. */
int loadstone_version(void) { return 2; }

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#include <cpuid.h>
#include <dlfcn.h>
#include <stdlib.h>

#define PAGE 4096

/* The highest level of this processor, LEVEL_NONE if it has none. */
int loadstone_native(void) {
#define HAS(feature) __builtin_cpu_supports(feature)
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx); /* older compilers know no name for F16C */
  if (!HAS("avx2") || !HAS("fma") || !(ecx & bit_F16C)) return LEVEL_NONE;
  if (!HAS("avx512f") || !HAS("avx512vl") || !HAS("avx512bw")) return LEVEL_AVX2;
  return HAS("avx512bf16") && HAS("avx512vbmi") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
#undef HAS
}

static const Level *the_level(long level, long dtype) {
  if (level == LEVEL_AVX512_BF16) return dtype == BF16 ? &avx512_pairs : &avx512_vbmi;
  return level == LEVEL_AVX512 ? &avx512 : &avx2;
}

/* ---- Threads ---- */

typedef struct {
  void (*part)(const Work *, const Level *, long me, long all);
  const Work *work;
  const Level *level;
} Job;

static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*thread_number)(void), (*thread_count)(void);

__attribute__((constructor)) static void find_openmp(void) {
  *(void **)&thread_number = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
  *(void **)&thread_count = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  if (thread_number && thread_count) *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
}

static void run_part(void *data) {
  const Job *job = data;
  job->part(job->work, job->level, thread_number(), thread_count());
}

static void in_threads(void (*part)(const Work *, const Level *, long, long), const Work *work, const Level *level,
                       long threads) {
  Job job = {part, work, level};
  if (threads > 1 && parallel) parallel(run_part, &job, (unsigned)threads, 0);
  else part(work, level, 0, 1);
}

/* Where the share of thread ``me`` begins, of ``count`` things that are handed out ``unit`` at a time. */
static long begin_of(long count, long unit, long me, long all) {
  const long begin = unit * ((count + unit - 1) / unit * me / all);
  return begin < count ? begin : count;
}

static void share_of_outputs(const Work *w, const Level *level, long me, long all) {
  char *room = w->scratch + me * w->share;
  const long scales = w->nested.bytes ? room_for_scales(w->width / w->blocksize) : 0;
  level->products(w, begin_of(w->outputs, PANEL, me, all), begin_of(w->outputs, PANEL, me + 1, all), (float *)room,
                  room + scales);
}

static void share_of_numbers(const Work *w, const Level *level, long me, long all) {
  level->decode(w, begin_of(w->outputs, w->blocksize, me, all), begin_of(w->outputs, w->blocksize, me + 1, all));
}

static void share_of_scales(const Work *w, const Level *level, long me, long all) {
  const long first = begin_of(w->outputs, 64, me, all), last = begin_of(w->outputs, 64, me + 1, all);
  level->expand(&w->nested, first, last - first, (float *)w->out + first, last - first);
}

/* ---- Calls ---- */

static void nest(Work *work, const Level *level, const uint8_t *bytes, const float *absmax, const float *code, float offset,
                 long blocksize) {
  Nested *nested = &work->nested;
  nested->bytes = bytes, nested->absmax = absmax, nested->code = code;
  nested->offset = offset, nested->blocksize = blocksize, nested->expand = level->expand;
  if (level->prepare) level->prepare(nested);
}

/* What reads ahead stops at the end of a page: no processor takes lines from another that writes the next thing. */
static long whole_pages(long bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

/* y = x @ weight.T, where absmax holds fp32 scales, or, with nested_absmax, bytes. 0, or 1 if there is no memory. */
int loadstone_linear_4bit(const void *x, const uint8_t *codes, const void *absmax, const float *code, float *y, long rows,
                          long outputs, long width, long blocksize, long dtype, const float *nested_absmax,
                          const float *nested_code, float offset, long nested_blocksize, long level_, long threads) {
  const Level *level = the_level(level_, dtype);
  /* Rows a power of two apart would compete for the same places in the cache. */
  const long stride = width + 128 / level->bytes_of_x, inputs = whole_pages(rows * stride * level->bytes_of_x);
  long share = 0;
  if (nested_absmax) share += room_for_scales(width / blocksize);
  if (rows > level->rows_in_registers) share += PANEL * width * (long)sizeof(uint16_t);
  share = whole_pages(share);
  char *memory = aligned_alloc(PAGE, (size_t)(inputs + share * (threads > 1 ? threads : 1)));
  if (!memory) return 1;
  Work work = {memory, codes, absmax, code, y, 0, rows, outputs, width, stride, blocksize, dtype, memory + inputs, share, {0}};
  if (nested_absmax) nest(&work, level, absmax, nested_absmax, nested_code, offset, nested_blocksize);
  level->arrange(&work, x, memory);
  in_threads(share_of_outputs, &work, level, threads);
  free(memory);
  return 0;
}

void loadstone_dequantize_4bit(const uint8_t *codes, const float *absmax, const float *code, void *out, long count,
                               long blocksize, long dtype, long level, long threads) {
  const Work work = {0, codes, absmax, code, 0, out, 0, count, 0, 0, blocksize, dtype, 0, 0, {0}};
  in_threads(share_of_numbers, &work, the_level(level, dtype), threads);
}

void loadstone_dequantize_absmax(const uint8_t *bytes, const float *absmax, const float *code, float *out, float offset,
                                 long count, long blocksize, long level, long threads) {
  Work work = {0, 0, 0, 0, 0, out, 0, count, 0, 0, 0, FP32, 0, 0, {0}};
  nest(&work, the_level(level, FP32), bytes, absmax, code, offset, blocksize);
  in_threads(share_of_scales, &work, the_level(level, FP32), threads);
}

void expand_plain(const Nested *nested, long first, long count, float *out, long room) {
  const float *absmax = nested->absmax + first / nested->blocksize;
  long end = nested->blocksize - first % nested->blocksize;
  (void)room;
  for (long k = 0; k < count; k = end, end += nested->blocksize) {
    const float scale = *absmax++;
    if (end > count) end = count;
    for (long i = k; i < end; i++) out[i] = nested->code[nested->bytes[first + i]] * scale + nested->offset;
  }
}
#else
int loadstone_native(void) { return LEVEL_NONE; }
#endif
