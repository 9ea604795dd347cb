// The sigmoid loss of pairs on Hopper: arguments that its entry points reject, and the layout of its arrays.
#pragma once

#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "../cuda/loss_plan.h"
#include "../fastclip.h"
#include "check.h"
#include "cuda_loss.h"

struct SigmoidCase : PlainCase {
  float bias = -1, d_scalars[2] = {};
  double wide = 0;
  std::vector<double> room;

  SigmoidCase() { room.resize(sizes.sigmoid / 8 + sizes.rows * sizes.stride / 4 + kN * kD); }
  int weigh(int64_t chunk = 0, int64_t column = 0) {
    return fastclip_cuda_sigmoid_weights(&c, &bias, room.data(), chunk, column, 1);
  }
  int finish(int64_t chunk = 0) {
    return fastclip_cuda_sigmoid_finish(&c, &bias, room.data(), chunk, kN, &loss, 0, d_image, d_text, d_scalars);
  }
};

inline void sigmoid_refusals() {
  for (const auto& [what, spoil] : pair_faults()) {
    SigmoidCase p;
    spoil(p.c);
    CHECK(p.weigh() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
    CHECK(p.finish() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
  }
  SigmoidCase p;
  p.c.image_weight = kInf - kInf;  // NaN: this loss must not read it
  for (int64_t chunk : {-1, 1}) {
    CHECK(p.weigh(chunk) == FASTCLIP_INVALID_ARGUMENT, "a chunk that does not exist");
    CHECK(p.finish(chunk) == FASTCLIP_INVALID_ARGUMENT, "a chunk that does not exist");
  }
  for (int64_t column : {-5, 3, 5})
    CHECK(p.weigh(0, column) == FASTCLIP_INVALID_ARGUMENT, "a block that does not exist");
  CHECK(fastclip_cuda_sigmoid_weights(&p.c, nullptr, p.room.data(), 0, 0, 1) == FASTCLIP_INVALID_ARGUMENT, "no bias");
  CHECK(fastclip_cuda_sigmoid_weights(&p.c, &p.bias, nullptr, 0, 0, 1) == FASTCLIP_INVALID_ARGUMENT, "no workspace");
  CHECK(fastclip_cuda_sigmoid_finish(&p.c, &p.bias, p.room.data(), 0, 1, nullptr, 0, nullptr, nullptr, nullptr) ==
            FASTCLIP_INVALID_ARGUMENT,
        "nowhere to write the loss");
  CHECK(p.weigh() == FASTCLIP_OK && p.finish() == FASTCLIP_OK && p.loss > 0, "a good problem");
  CHECK(fastclip_cuda_sigmoid_weights(&p.c, &p.bias, p.room.data(), 0, 0, 0) == FASTCLIP_OK &&
            fastclip_cuda_sigmoid_finish(&p.c, &p.bias, p.room.data(), 0, PlainCase::kN, &p.wide, 1, nullptr, nullptr,
                                         nullptr) == FASTCLIP_OK,
        "the loss alone");
  CHECK(std::fabs(p.wide - p.loss) <= 1e-6 * p.loss, "the loss in fp64");
}

inline void sigmoid_factors() {
  alignas(16) uint16_t kept[8] = {}, out[8] = {};
  float upstream = 1, scalars[2] = {};
  const fastclip_cuda_factors good = {&upstream, kept,        kept, &upstream, &upstream, out, out,
                                      scalars,   scalars + 1, 8,    8,         0,         -1,  nullptr};
  const std::pair<const char*, std::function<void(fastclip_cuda_factors&)>> faults[] = {
      {"no upstream", [](auto& c) { c.upstream = nullptr; }},
      {"a gradient of nothing", [](auto& c) { c.kept_image = nullptr; }},
      {"a gradient of nothing", [](auto& c) { c.kept_text = nullptr; }},
      {"a scalar's gradient of nothing", [](auto& c) { c.kept_bias = nullptr; }},
      {"fewer elements than none", [](auto& c) { c.text_count = -1; }},
      {"a dtype that does not exist", [](auto& c) { c.dtype = 2; }},
  };
  for (const auto& [what, spoil] : faults) {
    fastclip_cuda_factors c = good;
    spoil(c);
    CHECK(fastclip_cuda_sigmoid_bwd(&c) == FASTCLIP_INVALID_ARGUMENT, "%s", what);
  }
  CHECK(fastclip_cuda_sigmoid_bwd(nullptr) == FASTCLIP_INVALID_ARGUMENT, "nothing");
  CHECK(fastclip_cuda_sigmoid_bwd(&good) == FASTCLIP_OK && scalars[0] == 1 && scalars[1] == 1, "a good problem");
  fastclip_cuda_factors none = good;
  none.d_image = none.d_text = nullptr, none.d_scale = none.d_bias = nullptr;
  none.kept_image = none.kept_text = nullptr;
  CHECK(fastclip_cuda_sigmoid_bwd(&none) == FASTCLIP_OK, "nothing wanted");
}

inline void sigmoid_layout() {
  using namespace fastclip;
  const auto up = [](int64_t size, int64_t length) { return (size + length - 1) / length; };
  for (int64_t N : {1, 7, 8, 9, 128, 129, 1000, 4096, 8192, 131072, 1 << 20, INT32_MAX - 256}) {
    const SigmoidWork w = sigmoid_work(N);
    const LossBackward b = loss_backward(N, 512, 1 << 30, 132);
    CHECK(w.tiles == up(N, 128) * up(N, b.tile_n) && w.parts == w.tiles + up(N, kRowsOfBlock), "shares");
    check_layout({{w.constants, 4 * kConstants},
                  {w.ticket, 4},
                  {w.own, 8 * N},
                  {w.inv[0], 4 * N},
                  {w.inv[1], 4 * N},
                  {w.factor[0], 4 * N},
                  {w.factor[1], 4 * N},
                  {w.top, 8 * up(N, kRowsOfBlock)},
                  {w.part, 24 * w.parts},
                  {w.piece, 24 * kPieces}},
                 w.bytes, N);
    fastclip_cuda_loss_sizes sizes;
    CHECK(fastclip_cuda_loss_plan(N, 512, 1 << 30, 132, &sizes) == FASTCLIP_OK && sizes.sigmoid == w.bytes &&
              w.bytes % 128 == 0,
          "what the plan says");
  }
}
