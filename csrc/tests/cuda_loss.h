// The plain case on Hopper: arguments that its entry points reject, and the layout of its arrays.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "../cuda/loss_plan.h"
#include "../fastclip.h"
#include "check.h"

struct PlainCase {
  static constexpr int64_t kN = 5, kD = 8;
  alignas(128) uint16_t image[kN * kD] = {}, text[kN * kD] = {}, d_image[kN * kD] = {}, d_text[kN * kD] = {};
  alignas(128) uint16_t image_copy[kN * kD] = {}, text_copy[kN * kD] = {};
  float scale = 2, loss = 0, upstream = 1, d_scale = 0, raw_image[kN * kD] = {}, raw_text[kN * kD] = {};
  fastclip_cuda_loss_sizes sizes = {};
  std::vector<double> saved, work, weights;  // aligned to 16 bytes: the kernels need no more, fastclip.h asks for 128
  fastclip_cuda_loss c = {image, text, kD, kD, image, text, kD, kD, kN, kD, 0, 1, &scale, 0.5, 1024, 4, -1, nullptr};

  PlainCase() {
    for (int64_t k = 0; k < kN * kD; ++k) image[k] = text[k] = static_cast<uint16_t>(0x3f80 + 16 * (k % 5));
    fastclip_cuda_loss_plan(kN, kD, c.workspace, c.processors, &sizes);
    saved.resize(sizes.saved / 8), work.resize(sizes.work / 8);
    weights.resize((sizes.rows + sizes.extra) * sizes.stride / 4);
  }
  int forward() { return fastclip_cuda_loss_forward(&c, saved.data(), work.data(), &loss); }
  int weigh(int64_t chunk = 0, int64_t column = 0) {
    return fastclip_cuda_loss_weights(&c, saved.data(), weights.data(), chunk, column);
  }
  int finish(int64_t chunk = 0) {
    return fastclip_cuda_loss_finish(&c, saved.data(), weights.data(), chunk, &upstream, raw_image, raw_text, d_image,
                                     d_text, &d_scale);
  }
};

using PairFaults = std::vector<std::pair<const char*, std::function<void(fastclip_cuda_loss&)>>>;

// Arguments that both losses of pairs reject.
inline PairFaults pair_faults() {
  return {
      {"no image", [](auto& c) { c.image = nullptr; }},
      {"no text", [](auto& c) { c.text = nullptr; }},
      {"no rows of images", [](auto& c) { c.image_rows = nullptr; }},
      {"no scale", [](auto& c) { c.scale = nullptr; }},
      {"rows not aligned", [](auto& c) { c.text_rows = static_cast<char*>(c.text_rows) + 2; }},
      {"rows' stride not of 16 bytes", [](auto& c) { c.image_rows_stride = 12; }},
      {"rows' stride too short", [](auto& c) { c.text_rows_stride = 0; }},
      {"no pairs", [](auto& c) { c.N = 0; }},
      {"no features", [](auto& c) { c.D = 0; }},
      {"more pairs than 31 bits", [](auto& c) { c.N = int64_t{1} << 31; }},
      {"an odd number of features without copies", [](auto& c) { c.D = 7; }},
      {"normalised fp16 without copies", [](auto& c) { c.dtype = FASTCLIP_FP16; }},
      {"a dtype that does not exist", [](auto& c) { c.dtype = 2; }},
      {"one processor", [](auto& c) { c.processors = 1; }},
      {"a negative workspace", [](auto& c) { c.workspace = -1; }},
  };
}

inline void plain_refusals() {
  PairFaults faults = pair_faults();
  const PairFaults weights = {
      {"a weight above 1", [](auto& c) { c.image_weight = 1.5; }},
      {"a weight that is no number", [](auto& c) { c.image_weight = kInf - kInf; }},
  };
  faults.insert(faults.end(), weights.begin(), weights.end());
  for (const auto& [what, spoil] : faults) {
    PlainCase p;
    spoil(p.c);
    CHECK(p.forward() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
    CHECK(p.weigh() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
    CHECK(p.finish() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
  }
  PlainCase p;
  CHECK(p.forward() == FASTCLIP_OK && p.loss > 0, "a good problem");
  for (int64_t chunk : {-1, 1}) {
    CHECK(p.weigh(chunk) == FASTCLIP_INVALID_ARGUMENT, "a chunk that does not exist");
    CHECK(p.finish(chunk) == FASTCLIP_INVALID_ARGUMENT, "a chunk that does not exist");
  }
  for (int64_t column : {-5, 3, 5})
    CHECK(p.weigh(0, column) == FASTCLIP_INVALID_ARGUMENT, "a block that does not exist");
  CHECK(p.weigh() == FASTCLIP_OK && p.finish() == FASTCLIP_OK, "a good problem");
  CHECK(fastclip_cuda_loss_forward(&p.c, nullptr, p.work.data(), &p.loss) == FASTCLIP_INVALID_ARGUMENT, "no saved");
  CHECK(fastclip_cuda_loss_forward(&p.c, p.saved.data(), p.work.data(), nullptr) == FASTCLIP_INVALID_ARGUMENT,
        "nowhere to write the loss");
  CHECK(fastclip_cuda_loss_finish(&p.c, p.saved.data(), p.weights.data(), 0, &p.upstream, nullptr, p.raw_text,
                                  p.d_image, p.d_text, &p.d_scale) == FASTCLIP_INVALID_ARGUMENT,
        "a gradient of no sums");
  PlainCase half;
  half.c.dtype = FASTCLIP_FP16, half.c.image_rows = half.image_copy, half.c.text_rows = half.text_copy;
  CHECK(half.forward() == FASTCLIP_OK && half.weigh() == FASTCLIP_OK && half.finish() == FASTCLIP_OK, "fp16");
}

// Check that arrays (offset, bytes) follow one another, are aligned, and end at `bytes`.
inline void check_layout(std::vector<std::pair<int64_t, int64_t>> arrays, int64_t bytes, int64_t N) {
  std::sort(arrays.begin(), arrays.end());
  int64_t end = 0;
  for (const auto& [at, size] : arrays) {
    CHECK(at >= end && at % 128 == 0, "N = %lld: an array at %lld before %lld", static_cast<long long>(N),
          static_cast<long long>(at), static_cast<long long>(end));
    end = at + size;
  }
  CHECK(end <= bytes, "N = %lld: arrays end at %lld of %lld", static_cast<long long>(N), static_cast<long long>(end),
        static_cast<long long>(bytes));
}

// Rows of a chunk (the most that fit, or fewer if these take the same time) and columns of its blocks. Waves: see
// loss_plan.cpp. Product waves are those of the library's tiles in the product with the texts, for the first chunk +
// for the second.
inline void plain_blocks() {
  using namespace fastclip;
  constexpr int64_t kMiB = 1 << 20;
  struct Case {
    int64_t N, D, workspace, most, rows, columns;
  };
  const Case cases[] = {
      {8192, 512, 1024 * kMiB, 8192, 8192, 8192},       // all
      {32768, 512, 1024 * kMiB, 8448, 8192, 32768},     // 8,448 rows would take 334 waves of clusters, not 332
      {65536, 768, 1024 * kMiB, 5632, 5632, 65536},     // fewer rows would need 13 chunks
      {24576, 1024, 1024 * kMiB, 21120, 12288, 24576},  // product waves: 5 + 1 with the most rows, 3 + 3 with these
      {24576, 512, 1024 * kMiB, 16896, 16128, 24576},   // product waves: 2 + 2 with equal chunks, 2 + 1 with these
      {49152, 512, 1024 * kMiB, 8448, 8448, 49152},     // 8,192 rows would take 750 waves of clusters, not 745
      {131072, 1024, 1024 * kMiB, 8448, 8448, 43776},   // columns are cut, because longer sums lose digits
      {32768, 512, 512 * kMiB, 8192, 8192, 32768},      // 97 % of a wave of rows: columns are not cut for the rest
      {32768, 512, 128 * kMiB, 7936, 6912, 8448},      {300, 8, 0, 128, 128, 128},
  };
  const auto up = [](int64_t size, int64_t length) { return (size + length - 1) / length; };
  for (const auto& [N, D, workspace, most, rows, columns] : cases) {
    const LossBackward b = loss_backward(N, D, workspace, 132);
    CHECK(b.rows == rows && b.chunks == up(N, most) && b.columns == columns,
          "N = %lld, D = %lld: %lld chunks of %lld rows, blocks of %lld columns", static_cast<long long>(N),
          static_cast<long long>(D), static_cast<long long>(b.chunks), static_cast<long long>(b.rows),
          static_cast<long long>(b.columns));
  }
}

inline void plain_layout() {
  using namespace fastclip;
  const auto up = [](int64_t size, int64_t length) { return (size + length - 1) / length; };
  for (int64_t N : {1, 31, 32, 33, 127, 128, 129, 1000, 4096, 8192, 131072, 1 << 20, INT32_MAX - 256})
    for (int64_t workspace : {0, 4096, 1 << 20, 1 << 27, 1 << 30}) {
      const LossSaved s = loss_saved(N);
      std::vector<std::pair<int64_t, int64_t>> arrays = {
          {s.constants, 4 * kConstants}, {s.own_scale, 8}, {s.own, 8 * N}};
      for (int k : {0, 1})
        arrays.insert(arrays.end(),
                      {{s.inv[k], 4 * N}, {s.factor[k], 4 * N}, {s.weight[k], 8 * N}, {s.lse2[k], 4 * N}});
      check_layout(arrays, s.bytes, N);
      CHECK(s.constants == 0 && s.own == 4 * kSavedHeader, "the header that the norms set to 0");

      const LossForward f = loss_forward(N, workspace);
      CHECK(f.panel == N || (f.panel % 128 == 0 && f.panel > 0), "a panel is whole tiles");
      const int64_t row_tiles = up(f.panel, 128);
      arrays = {{f.tickets, 4 * (2 + f.blocks)},
                {f.cosine, 8 * N},
                {f.top, 8 * up(N, kRowsOfBlock)},
                {f.record, 8 * kRecordValues * f.records},
                {f.sums[0], 8 * N},
                {f.sums[1], 8 * N},
                {f.part[0], std::max(4 * up(N, f.tile_n), 8 * up(N, kExactColumns)) * f.panel},
                {f.part[1], 8 * row_tiles * N}};
      check_layout(arrays, f.bytes, N);
      // Partial sums stay inside the workspace, unless it holds less than one row of tiles
      const int64_t parts = 8 * (up(N, kExactColumns) * f.panel + row_tiles * N);
      CHECK(parts <= std::max(workspace, 1024 * (up(N, kExactColumns) + up(N, 128))) + 8 * N, "%lld bytes of parts",
            static_cast<long long>(parts));

      for (int64_t D : {8, 512, 1376})
        for (int processors : {2, 132}) {
          const LossBackward b = loss_backward(N, D, workspace, processors);
          CHECK((b.columns == N || b.columns % std::lcm(128, b.tile_n) == 0) &&
                    b.columns <= std::min<int64_t>(N, 65536) && b.rows <= 65536 && b.stride >= b.columns &&
                    b.stride < b.columns + 128,
                "blocks of columns, and terms of a sum");
          CHECK((b.rows == N || b.rows % 128 == 0) && b.rows > 0 && b.rows * b.chunks >= N &&
                    b.rows * (b.chunks - 1) < N && b.stride % 8 == 0,
                "chunks of rows");
          const int64_t least = 2 * std::min<int64_t>(128, N) * std::lcm(128, b.tile_n);  // 128 rows of whole tiles
          CHECK(2 * std::min(b.rows, N) * b.stride <= std::max(workspace, least), "weights' bytes");
          CHECK(b.tile_parts >= up(N, 128) * up(N, b.tile_n), "shares of d_scale");
          check_layout({{b.ticket, 4},
                        {b.tile_part, 4 * b.tile_parts},
                        {b.block_part, 8 * (up(b.rows, kRowsOfBlock) + up(N, kRowsOfBlock))}},
                       2 * b.stride * b.extra, N);
        }
    }
}
