// Arguments that the C interface of the Hopper kernels accepts and rejects. No GPU is needed, because the emulator runs
// accepted problems. Results are tested from Python (tests/backends/test_cuda.py).
#include <cstring>
#include <functional>
#include <utility>

#include "../fastclip.h"
#include "check.h"
#include "cuda_loss.h"
#include "cuda_sigmoid.h"

namespace {

constexpr int64_t kM = 5, kN = 9, kD = 8;

struct Problem {
  alignas(16) uint16_t image[kM * kD] = {}, text[kN * kD] = {}, weights[kM * 16] = {};
  alignas(16) float row[kM] = {}, col[kN] = {}, row_part[3 * kM] = {}, col_part[3 * kN] = {}, scale_part[1] = {};
  int32_t row_label[kM] = {}, col_label[kN] = {};
  float constants[5] = {1, 0, 0, 0, 1};
  double part[3] = {};
  fastclip_cuda_block block = {image, text, kD, kD, kM, kN, kD, 0, 0, FASTCLIP_BF16, 192, 132, constants, nullptr};
  fastclip_cuda_fwd_side fwd[2] = {{row, nullptr, row_part}, {col, nullptr, col_part}};
  fastclip_cuda_bwd_side bwd[2] = {{row, row, nullptr, nullptr, nullptr}, {col, col, nullptr, nullptr, nullptr}};

  void label() {
    fwd[0].label = bwd[0].label = row_label, fwd[1].label = bwd[1].label = col_label;
    bwd[0].pos = bwd[0].own = row, bwd[1].pos = bwd[1].own = col;
  }
  int statistics() { return fastclip_cuda_contrastive_fwd(&block, &fwd[0], &fwd[1]); }
  int weigh() { return fastclip_cuda_contrastive_bwd(&block, &bwd[0], &bwd[1], weights, 16, scale_part); }
  int sigmoid() { return fastclip_cuda_sigmoid_fwd(&block, row, col, constants, 1, weights, 16, part, 1); }
};

// A problem with one fault must be rejected by every entry point.
void blocks() {
  constexpr int64_t kTooMany = int64_t{1} << 31;
  const std::pair<const char*, std::function<void(fastclip_cuda_block&)>> faults[] = {
      {"no image", [](auto& b) { b.image = nullptr; }},
      {"no text", [](auto& b) { b.text = nullptr; }},
      {"no constants", [](auto& b) { b.constants = nullptr; }},
      {"image not aligned", [](auto& b) { b.image = static_cast<const char*>(b.image) + 8; }},
      {"text not aligned", [](auto& b) { b.text = static_cast<const char*>(b.text) + 2; }},
      {"image stride too short", [](auto& b) { b.image_row_stride = 0; }},
      {"text stride not of 16 bytes", [](auto& b) { b.text_row_stride = 12; }},
      {"negative stride", [](auto& b) { b.image_row_stride = -8; }},
      {"no rows", [](auto& b) { b.M = 0; }},
      {"no columns", [](auto& b) { b.N = -1; }},
      {"no features", [](auto& b) { b.D = 0; }},
      {"more rows than 31 bits", [](auto& b) { b.M = kTooMany; }},
      {"more columns than 31 bits", [](auto& b) { b.N = kTooMany; }},
      {"more features than 31 bits",
       [](auto& b) { b.D = kTooMany, b.image_row_stride = b.text_row_stride = kTooMany; }},
      {"more tiles than 31 bits", [](auto& b) { b.M = b.N = kTooMany - 1000; }},
      {"a dtype that does not exist", [](auto& b) { b.dtype = 2; }},
      {"a tile that does not exist", [](auto& b) { b.tile_n = 100; }},
      {"another kernel's tile", [](auto& b) { b.tile_n = FASTCLIP_CUDA_TILE_N_LABELS; }},
      {"one processor", [](auto& b) { b.processors = 1; }},
  };
  for (const auto& [what, spoil] : faults) {
    Problem p;
    spoil(p.block);
    CHECK(p.statistics() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
    CHECK(p.weigh() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
    CHECK(p.sigmoid() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
  }
}

void sides() {
  const std::pair<const char*, std::function<void(Problem&)>> faults[] = {
      {"no factor", [](auto& p) { p.fwd[0].factor = nullptr, p.bwd[0].factor = nullptr; }},
      {"no factor", [](auto& p) { p.fwd[1].factor = nullptr, p.bwd[1].factor = nullptr; }},
      {"nothing to write or to weigh with", [](auto& p) { p.fwd[0].part = nullptr, p.bwd[0].neg = nullptr; }},
      {"nothing to write or to weigh with", [](auto& p) { p.fwd[1].part = nullptr, p.bwd[1].neg = nullptr; }},
      {"labels on one side", [](auto& p) { p.label(), p.fwd[0].label = nullptr, p.bwd[0].label = nullptr; }},
      {"labels on one side", [](auto& p) { p.label(), p.fwd[1].label = nullptr, p.bwd[1].label = nullptr; }},
  };
  for (const auto& [what, spoil] : faults) {
    Problem p;
    spoil(p);
    CHECK(p.statistics() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
    CHECK(p.weigh() == FASTCLIP_INVALID_ARGUMENT, "%s", what);
  }
  for (const float* fastclip_cuda_bwd_side::* member : {&fastclip_cuda_bwd_side::pos, &fastclip_cuda_bwd_side::own})
    for (int side : {0, 1}) {
      Problem p;
      p.label(), p.bwd[side].*member = nullptr;
      CHECK(p.weigh() == FASTCLIP_INVALID_ARGUMENT, "labels without their weights");
    }
  Problem p;
  CHECK(fastclip_cuda_contrastive_fwd(nullptr, &p.fwd[0], &p.fwd[1]) == FASTCLIP_INVALID_ARGUMENT, "no block");
  CHECK(fastclip_cuda_contrastive_fwd(&p.block, nullptr, &p.fwd[1]) == FASTCLIP_INVALID_ARGUMENT, "no images");
  CHECK(fastclip_cuda_contrastive_bwd(&p.block, &p.bwd[0], nullptr, p.weights, 16, p.scale_part) ==
            FASTCLIP_INVALID_ARGUMENT,
        "no texts");
}

void outputs() {
  Problem p;
  const auto weigh = [&](void* weights, int64_t stride, float* part) {
    return fastclip_cuda_contrastive_bwd(&p.block, &p.bwd[0], &p.bwd[1], weights, stride, part);
  };
  CHECK(weigh(nullptr, 16, p.scale_part) == FASTCLIP_INVALID_ARGUMENT, "no weights");
  CHECK(weigh(p.weights + 1, 16, p.scale_part) == FASTCLIP_INVALID_ARGUMENT, "weights not aligned");
  CHECK(weigh(p.weights, 8, p.scale_part) == FASTCLIP_INVALID_ARGUMENT, "weights' stride too short");
  CHECK(weigh(p.weights, 12, p.scale_part) == FASTCLIP_INVALID_ARGUMENT, "weights' stride not of 16 bytes");
  CHECK(weigh(p.weights, 16, nullptr) == FASTCLIP_INVALID_ARGUMENT, "no scale_part");
  const auto sigmoid = [&](const float* bias, int gradients, void* weights, double* part) {
    return fastclip_cuda_sigmoid_fwd(&p.block, p.row, p.col, bias, gradients, weights, 16, part, 1);
  };
  CHECK(sigmoid(nullptr, 1, p.weights, p.part) == FASTCLIP_INVALID_ARGUMENT, "no bias");
  CHECK(sigmoid(p.constants, 1, nullptr, p.part) == FASTCLIP_INVALID_ARGUMENT, "gradients without weights");
  CHECK(sigmoid(p.constants, 0, nullptr, nullptr) == FASTCLIP_INVALID_ARGUMENT, "no part");
  CHECK(sigmoid(p.constants, 0, nullptr, p.part) == FASTCLIP_OK, "weights are not needed");
}

void good() {
  for (bool labels : {false, true})
    for (int dtype : {FASTCLIP_BF16, FASTCLIP_FP16})
      for (bool small : {false, true}) {
        Problem p;
        if (labels) p.label();
        p.block.dtype = dtype;
        p.block.tile_n = small    ? FASTCLIP_CUDA_TILE_N_SMALL
                         : labels ? FASTCLIP_CUDA_TILE_N_LABELS
                                  : FASTCLIP_CUDA_TILE_N;
        CHECK(p.statistics() == FASTCLIP_OK, "statistics");
        if (!small) p.block.tile_n = FASTCLIP_CUDA_TILE_N;
        CHECK(p.weigh() == FASTCLIP_OK, "weights");
        CHECK(p.sigmoid() == FASTCLIP_OK, "sigmoid");
      }
}

void names() {
  CHECK(std::strcmp(fastclip_cuda_error_name(FASTCLIP_INVALID_ARGUMENT), "not an error of CUDA") == 0, "a status");
  CHECK(std::strlen(fastclip_cuda_error_name(FASTCLIP_CUDA_ERROR + 2)) > 0, "an error of CUDA");
}

}  // namespace

int main() {
  blocks(), sides(), outputs(), good(), names();
  plain_refusals(), plain_layout(), plain_blocks();
  sigmoid_refusals(), sigmoid_factors(), sigmoid_layout();
  std::printf("%d failures\n", g_failures);
  return g_failures != 0;
}
