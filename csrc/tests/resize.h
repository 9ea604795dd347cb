// Resizing: properties that need no reference, in buffers of exactly their size. Python's tests compare with Pillow.
#pragma once

#include <cstring>

#include "../fastclip.h"
#include "check.h"

struct Pixels {
  int64_t width, height, stride;  // stride in bytes
  std::vector<uint8_t> data;
  Pixels(int64_t width, int64_t height, int64_t gap)
      : width(width), height(height), stride(4 * width + gap), data((height - 1) * stride + 4 * width) {}
};

inline int resized(const Pixels& in, Pixels* out, int cubic, int columns_first) {
  return fastclip_cpu_resize(in.data.data(), in.stride, in.width, in.height, out->data.data(), out->width, out->height,
                             cubic, columns_first);
}

inline void resize() {
  Random random;
  fastclip_cpu_select_isa("portable");
  Pixels small(20, 20, 0), target(9, 9, 0);
  CHECK(resized(small, &target, 1, 0) == FASTCLIP_UNSUPPORTED_ISA, "portable");
  fastclip_cpu_select_isa("auto");
  if (std::strcmp(fastclip_cpu_isa(), "portable") == 0) return;
  CHECK(fastclip_cpu_resize(nullptr, 80, 20, 20, target.data.data(), 9, 9, 1, 0) == FASTCLIP_INVALID_ARGUMENT, "null");
  CHECK(fastclip_cpu_resize(small.data.data(), 79, 20, 20, target.data.data(), 9, 9, 1, 0) == FASTCLIP_INVALID_ARGUMENT,
        "rows overlap");
  int done = 0;
  for (int k = 0; k < 300; ++k) {
    const int cubic = k & 1, columns_first = k >> 1 & 1;
    Pixels in(static_cast<int64_t>(random.uniform(1, 90)), static_cast<int64_t>(random.uniform(1, 90)), k % 5);
    const bool same = k % 3 == 0;
    Pixels out(same ? in.width : static_cast<int64_t>(random.uniform(1, 70)),
               same ? in.height : static_cast<int64_t>(random.uniform(1, 70)), 0);
    const uint8_t grey = static_cast<uint8_t>(random.uniform(0, 256));
    for (uint8_t& byte : in.data) byte = same ? static_cast<uint8_t>(random.uniform(0, 256)) : grey;
    const int status = resized(in, &out, cubic, columns_first);
    if (status == FASTCLIP_UNSUPPORTED_SIZE) continue;
    CHECK(status == FASTCLIP_OK, "status %d", status);
    ++done;
    bool kept = true;  // an image of one colour keeps it, and an image that keeps its size keeps its pixels
    for (int64_t y = 0; y < out.height; ++y) {
      for (int64_t x = 0; x < 4 * out.width; ++x) {
        kept &= out.data[y * out.stride + x] == (same ? in.data[y * in.stride + x] : grey);
      }
    }
    CHECK(kept, "%d x %d to %d x %d", int(in.width), int(in.height), int(out.width), int(out.height));
  }
  CHECK(done > 150, "%d images were resized", done);
}
