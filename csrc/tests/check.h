// Tools of the native tests: CHECK, arrays of exact size, random numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

inline int g_failures = 0;

#define CHECK(condition, ...)                                                \
  do {                                                                       \
    if (!(condition)) {                                                      \
      if (++g_failures <= 20) {                                              \
        std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::fprintf(stderr, __VA_ARGS__);                                   \
        std::fprintf(stderr, "\n");                                          \
      }                                                                      \
    }                                                                        \
  } while (0)

constexpr double kInf = HUGE_VAL;

// Random numbers that are the same everywhere: std::uniform_real_distribution differs between libraries.
struct Random {
  std::mt19937 engine{1};
  double uniform(double low, double high) { return low + (high - low) * (engine() / 4294967296.0); }
};

// A matrix in an allocation of exactly its size, with rows `stride` apart and marked gaps between them.
// AddressSanitizer reports an access past either end, and this class detects a write into a gap.
struct Matrix {
  static constexpr float kMark = -12345.0f;
  int64_t M, N, stride;
  std::vector<float> data;
  Matrix(int64_t M, int64_t N, int64_t gap = 3)
      : M(M), N(N), stride(N + gap), data(static_cast<size_t>((M - 1) * stride + N), kMark) {}
  float& at(int64_t i, int64_t j) { return data[static_cast<size_t>(i * stride + j)]; }
  float at(int64_t i, int64_t j) const { return data[static_cast<size_t>(i * stride + j)]; }
  void check_gaps() const {
    for (int64_t i = 0; i + 1 < M; ++i)
      for (int64_t j = N; j < stride; ++j)
        CHECK(at(i, j) == kMark, "gap (%lld, %lld) was overwritten", static_cast<long long>(i),
              static_cast<long long>(j));
  }
};
