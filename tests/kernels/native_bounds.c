/* Calls of the compiled 4-bit code at odd sizes, in memory that ends (or begins) where it is allowed to: an access beyond
   is a fault, here by a page that cannot be touched, under a sanitizer by its own guards. Results are compared with plain
   loops. Prints the number of calls; ends with 1 where a result is wrong. */

#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int loadstone_native(void);
int loadstone_linear_4bit(const void *, const uint8_t *, const void *, const float *, float *, long, long, long, long, long,
                          const float *, const float *, float, long, long, long);
void loadstone_dequantize_4bit(const uint8_t *, const float *, const float *, void *, long, long, long, long, long);
void loadstone_dequantize_absmax(const uint8_t *, const float *, const float *, float *, float, long, long, long, long);

enum { FP32, BF16, FP16, PAGE = 4096 };
static uint32_t state = 1;
static long calls;

static uint32_t next(void) { return state = state * 1664525u + 1013904223u, state >> 8; }
static float number(void) { return (float)next() / (1 << 23) - 1; }

static void check(int right, const char *what, long a, long b, long c) {
  if (right) return;
  printf("%s differs at %ld %ld %ld\n", what, a, b, c);
  exit(1);
}

/* Memory of exactly this size. */
typedef struct {
  char *at, *base;
  size_t room;
} Memory;

static Memory exactly(size_t size, int at_end) {
#ifdef SANITIZED
  (void)at_end;
  char *at = malloc(size);
  return (Memory){at, at, 0};
#else
  const size_t pages = (size + PAGE - 1) / PAGE * PAGE;
  char *base = mmap(0, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(base + PAGE, pages, PROT_READ | PROT_WRITE);
  return (Memory){base + PAGE + (at_end ? pages - size : 0), base, pages + 2 * PAGE};
#endif
}

static void release(Memory memory) {
  if (memory.room) munmap(memory.base, memory.room);
  else free(memory.base);
}

static Memory floats(size_t count, int at_end) {
  Memory memory = exactly(count * sizeof(float), at_end);
  for (size_t i = 0; i < count; i++) ((float *)memory.at)[i] = number();
  return memory;
}

static Memory bytes(size_t count, int at_end) {
  Memory memory = exactly(count, at_end);
  for (size_t i = 0; i < count; i++) memory.at[i] = (char)next();
  return memory;
}

static float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static float bf16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

/* Of numbers that are neither large nor subnormal in fp16. */
static float fp16_of(float value) {
  const float step = ldexpf(1, (int)floorf(log2f(fabsf(value) + 1e-30f)) - 10);
  return fabsf(value) < 6.2e-5f ? rintf(value * 16777216) / 16777216 : rintf(value / step) * step;
}

static float rounded(float value, long dtype) { return dtype == BF16 ? bf16_of(value) : dtype == FP16 ? fp16_of(value) : value; }

static float read_number(const void *from, long k, long dtype) {
  if (dtype == FP32) return ((const float *)from)[k];
  const uint16_t bits = ((const uint16_t *)from)[k];
  if (dtype == BF16) return from_bits((uint32_t)bits << 16);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? ldexpf(1 + fraction / 1024.0f, exponent - 15) : ldexpf((float)fraction, -24);
  return bits >> 15 ? -size : size;
}

static long nibble(const Memory *codes, long k) {
  const uint8_t byte = (uint8_t)codes->at[k / 2];
  return k % 2 ? byte & 15 : byte >> 4;
}

static void decode(long level, long count, long blocksize, long dtype, long threads, int at_end) {
  const long size = dtype == FP32 ? 4 : 2;
  Memory codes = bytes((size_t)(count + 1) / 2, at_end), absmax = floats((size_t)((count + blocksize - 1) / blocksize), at_end);
  Memory code = floats(16, at_end), out = exactly((size_t)(count * size), at_end);
  const float *numbers = (float *)code.at, *scales = (float *)absmax.at;
  loadstone_dequantize_4bit((uint8_t *)codes.at, scales, numbers, out.at, count, blocksize, dtype, level, threads);
  for (long k = 0; k < count; k++)
    check(read_number(out.at, k, dtype) == rounded(numbers[nibble(&codes, k)] * scales[k / blocksize], dtype), "decoding", k,
          count, dtype);
  release(codes), release(absmax), release(code), release(out);
  calls++;
}

static void expand(long level, long count, long blocksize, long threads, int at_end) {
  Memory codes = bytes((size_t)count, at_end), absmax = floats((size_t)((count + blocksize - 1) / blocksize), at_end);
  Memory code = floats(256, at_end), out = exactly((size_t)count * sizeof(float), at_end);
  const float *numbers = (float *)code.at, *scales = (float *)absmax.at;
  loadstone_dequantize_absmax((uint8_t *)codes.at, scales, numbers, (float *)out.at, 0.3f, count, blocksize, level, threads);
  for (long k = 0; k < count; k++) {
    const float product = numbers[(uint8_t)codes.at[k]] * scales[k / blocksize];
    check(((float *)out.at)[k] == product + 0.3f, "a scale", k, count, blocksize);
  }
  release(codes), release(absmax), release(code), release(out);
  calls++;
}

static void multiply(long level, long rows, long outputs, long blocks, long blocksize, long dtype, int nested, long threads,
                     int at_end) {
  const long width = blocks * blocksize, count = outputs * blocks, size = dtype == FP32 ? 4 : 2;
  Memory x = exactly((size_t)(rows * width * size), at_end), codes = bytes((size_t)(outputs * width / 2), at_end);
  Memory absmax = nested ? bytes((size_t)count, at_end) : floats((size_t)count, at_end);
  Memory more = floats((size_t)(count + 99) / 100, at_end), table = floats(256, at_end);
  Memory code = floats(16, at_end), y = exactly((size_t)(rows * outputs) * sizeof(float), at_end);
  for (long k = 0; k < rows * width; k++) {
    const float value = number();
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (dtype == FP32) ((float *)x.at)[k] = value;
    else ((uint16_t *)x.at)[k] = dtype == BF16 ? (uint16_t)(bits >> 16) : (uint16_t)(0x3800 + next() % 1024);
  }
  check(!loadstone_linear_4bit(x.at, (uint8_t *)codes.at, absmax.at, (float *)code.at, (float *)y.at, rows, outputs, width,
                               blocksize, dtype, nested ? (float *)more.at : 0, nested ? (float *)table.at : 0, 0.3f, 100,
                               level, threads),
        "memory", rows, outputs, width);
  for (long row = 0; row < rows; row++)
    for (long n = 0; n < outputs; n++) {
      double sum = 0;
      for (long k = 0; k < width; k++) {
        const long block = (n * width + k) / blocksize;
        const float product = ((float *)table.at)[(uint8_t)absmax.at[nested ? block : 0]] * ((float *)more.at)[block / 100];
        const float scale = nested ? product + 0.3f : ((float *)absmax.at)[block];
        sum += rounded(((float *)code.at)[nibble(&codes, n * width + k)] * scale, dtype) *
               (double)read_number(x.at, row * width + k, dtype);
      }
      check(fabs(sum - ((float *)y.at)[row * outputs + n]) < 1e-5 * (double)width, "a product", row, n, width);
    }
  release(x), release(codes), release(absmax), release(more), release(table), release(code), release(y);
  calls++;
}

int main(void) {
  const long counts[] = {1, 2, 31, 32, 33, 63, 64, 65, 97, 130, 255, 1000, 4097}, blocksizes[] = {32, 64, 128, 4096};
  const long rows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 17, 31}, outputs[] = {1, 2, 3, 4, 5, 7, 9};
  for (long level = 1; level <= loadstone_native(); level++)
    for (int at_end = 0; at_end < 2; at_end++) {
      for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (int b = 0; b < 4; b++)
          for (long threads = 1; threads < 4; threads += 2) {
            for (long dtype = FP32; dtype <= FP16; dtype++) decode(level, counts[i], blocksizes[b], dtype, threads, at_end);
            expand(level, counts[i], b ? blocksizes[b] : 7, threads, at_end);
          }
      for (size_t r = 0; r < sizeof rows / sizeof *rows; r++)
        for (size_t n = 0; n < sizeof outputs / sizeof *outputs; n++)
          for (long dtype = FP32; dtype <= FP16; dtype++)
            for (int nested = 0; nested < 2; nested++)
              for (int b = 0; b < 2; b++)
                multiply(level, rows[r], outputs[n], 1 + (long)next() % 5, blocksizes[b], dtype, nested, 1 + 2 * b, at_end);
      multiply(level, 2, 3, 1, 4096, BF16, 1, 1, at_end);
      multiply(level, 6, 9, 88, 64, BF16, 1, 3, at_end);
    }
  printf("%ld calls\n", calls);
  return 0;
}
