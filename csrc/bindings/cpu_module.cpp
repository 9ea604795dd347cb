// Python binding of the CPU kernels. It takes addresses and turns error codes into exceptions. The caller
// (fastclip/_backends/cpu/) checks shapes and dtypes; this file uses neither torch nor numpy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>

#include "../fastclip.h"
#include "address.h"

namespace py = pybind11;

namespace {

void check(int status) {
  switch (status) {
    case FASTCLIP_OK:
      return;
    case FASTCLIP_OUT_OF_MEMORY:
      throw std::bad_alloc();
    case FASTCLIP_UNSUPPORTED_ISA:
      throw std::invalid_argument("fastclip: this processor or build has no such instruction set");
    case FASTCLIP_UNSUPPORTED_SIZE:
      throw std::invalid_argument("fastclip: the image is too small for the filter");
    case FASTCLIP_FAILED:
      throw std::runtime_error("fastclip: the native code failed with a C++ exception");
    default:
      throw std::runtime_error("fastclip: the native code refused its arguments (status " + std::to_string(status) +
                               ")");
  }
}

fastclip_fwd_side fwd_side(uintptr_t factor, uintptr_t factor_low, uintptr_t label, uintptr_t limit, uintptr_t neg_max,
                           uintptr_t neg_sum, uintptr_t pos, uintptr_t pos_max, uintptr_t pos_sum, uintptr_t neg_top,
                           uintptr_t pos_top, uintptr_t other_factor, uintptr_t neg_other) {
  return {pointer<const float>(factor), pointer<const float>(factor_low), pointer<const int32_t>(label),
          pointer<const float>(limit),  pointer<double>(neg_max),         pointer<double>(neg_sum),
          pointer<double>(pos),         pointer<double>(pos_max),         pointer<double>(pos_sum),
          pointer<float>(neg_top),      pointer<float>(pos_top),          pointer<const float>(other_factor),
          pointer<double>(neg_other)};
}

fastclip_bwd_side bwd_side(uintptr_t factor, uintptr_t factor_low, uintptr_t inv_norm, uintptr_t label, uintptr_t limit,
                           uintptr_t neg, uintptr_t d_neg, uintptr_t d_pos, uintptr_t pos_lse, uintptr_t d_pos_lse) {
  return {pointer<const float>(factor),   pointer<const float>(factor_low), pointer<const float>(inv_norm),
          pointer<const int32_t>(label),  pointer<const float>(limit),      pointer<const float>(neg),
          pointer<const float>(d_neg),    pointer<const float>(d_pos),      pointer<const float>(pos_lse),
          pointer<const float>(d_pos_lse)};
}

// The calls below take plain numbers in place of a Block object, because a training step on few rows waits for the
// construction of each Python object.
fastclip_block block_at(uintptr_t dot, int64_t row_stride, int64_t M, int64_t N, int64_t i0, int64_t j0,
                        int64_t offset = 0) {
  return {pointer<float>(dot), row_stride, M, N, i0, j0, offset, 0, nullptr};
}

// The array of Arrow's C data interface, in the part that is read here
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray** children;
};

// Returns the pixels of an image, 4 bytes each, from the capsule that Pillow's Image.__arrow_c_array__ returns.
const uint8_t* pixels_of(const py::capsule& capsule, int64_t width, int64_t height) {
  const auto* array = static_cast<const ArrowArray*>(PyCapsule_GetPointer(capsule.ptr(), "arrow_array"));
  if (array == nullptr) throw py::error_already_set();
  const bool pixels = array->n_children == 1 && array->length == width * height && array->offset == 0 &&
                      array->children[0]->length == 4 * array->length && array->children[0]->offset == 0 &&
                      array->children[0]->n_buffers == 2;
  if (!pixels) throw std::invalid_argument("fastclip: the array does not hold an image of 4 bytes per pixel");
  return static_cast<const uint8_t*>(array->children[0]->buffers[1]);
}

fastclip_loss loss_of(uintptr_t saved, int64_t N) { return {N, 0, 0.0, 0.0, pointer<double>(saved)}; }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "fastclip's native CPU kernels (csrc/cpu). Internal: use fastclip.contrastive_loss.";

  py::class_<fastclip_block>(m, "Block")
      .def(py::init([](uintptr_t dot, int64_t row_stride, int64_t M, int64_t N, int64_t i0, int64_t j0, int64_t offset,
                       bool exclude_self, uintptr_t other) {
             return fastclip_block{pointer<float>(dot),        row_stride, M, N, i0, j0, offset, exclude_self,
                                   pointer<const float>(other)};
           }),
           py::kw_only(), py::arg("dot"), py::arg("row_stride"), py::arg("M"), py::arg("N"), py::arg("i0"),
           py::arg("j0"), py::arg("offset"), py::arg("exclude_self"), py::arg("other"));
  py::class_<fastclip_fwd_side>(m, "FwdSide")
      .def(py::init(&fwd_side), py::kw_only(), py::arg("factor"), py::arg("factor_low"), py::arg("label"),
           py::arg("limit"), py::arg("neg_max"), py::arg("neg_sum"), py::arg("pos"), py::arg("pos_max"),
           py::arg("pos_sum"), py::arg("neg_top"), py::arg("pos_top"), py::arg("other_factor"), py::arg("neg_other"));
  py::class_<fastclip_bwd_side>(m, "BwdSide")
      .def(py::init(&bwd_side), py::kw_only(), py::arg("factor"), py::arg("factor_low"), py::arg("inv_norm"),
           py::arg("label"), py::arg("limit"), py::arg("neg"), py::arg("d_neg"), py::arg("d_pos"), py::arg("pos_lse"),
           py::arg("d_pos_lse"));

  m.def(
      "contrastive_fwd",
      [](const fastclip_block& block, const fastclip_fwd_side& image, const fastclip_fwd_side& text, int num_threads) {
        check(fastclip_cpu_contrastive_fwd(&block, &image, &text, num_threads));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "contrastive_bwd",
      [](const fastclip_block& block, const fastclip_bwd_side& image, const fastclip_bwd_side& text, int num_threads) {
        double d_scale = 0.0;
        check(fastclip_cpu_contrastive_bwd(&block, &image, &text, &d_scale, num_threads));
        return d_scale;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "sigmoid_fwd",  // returns (loss, d_scale, d_bias) of the block
      [](uintptr_t image_inv_norm, uintptr_t text_inv_norm, double scale, float bias, uintptr_t image_label,
         uintptr_t text_label, uintptr_t image_limit, uintptr_t text_limit, bool gradients, int64_t offset,
         bool exclude_self, uintptr_t dot, int64_t row_stride, int64_t M, int64_t N, int64_t i0, int64_t j0,
         int num_threads) {
        fastclip_block block = block_at(dot, row_stride, M, N, i0, j0, offset);
        block.exclude_self = exclude_self;
        const fastclip_sigmoid sigmoid{pointer<const float>(image_inv_norm),
                                       pointer<const float>(text_inv_norm),
                                       scale,
                                       bias,
                                       pointer<const int32_t>(image_label),
                                       pointer<const int32_t>(text_label),
                                       pointer<const float>(image_limit),
                                       pointer<const float>(text_limit)};
        fastclip_sigmoid_sums sums{};
        check(fastclip_cpu_sigmoid_fwd(&block, &sigmoid, gradients, &sums, num_threads));
        return std::array<double, 3>{sums.loss, sums.d_scale, sums.d_bias};
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "direction_fwd",  // returns (loss, d_scale) of the block
      [](uintptr_t image_inv_norm, uintptr_t text_inv_norm, double scale, uintptr_t image_label, uintptr_t text_label,
         uintptr_t count, int64_t offset, bool exclude_self, uintptr_t row_factor, uintptr_t dot, int64_t M, int64_t N,
         int64_t i0, int num_threads) {
        fastclip_block block = block_at(dot, N, M, N, i0, 0, offset);
        block.exclude_self = exclude_self;
        const fastclip_direction direction{pointer<const float>(image_inv_norm),
                                           pointer<const float>(text_inv_norm),
                                           scale,
                                           pointer<const int32_t>(image_label),
                                           pointer<const int32_t>(text_label),
                                           pointer<const int64_t>(count),
                                           pointer<float>(row_factor)};
        fastclip_direction_sums sums{};
        check(fastclip_cpu_direction(&block, &direction, &sums, num_threads));
        return std::array<double, 2>{sums.loss, sums.d_scale};
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "norms",  // returns the number of large rows
      [](uintptr_t x, int64_t row_stride, int64_t M, int64_t D, uintptr_t inv_norm, uintptr_t outer, int num_threads) {
        int64_t large = 0;
        check(fastclip_cpu_norms(pointer<const float>(x), row_stride, M, D, pointer<float>(inv_norm),
                                 pointer<float>(outer), &large, num_threads));
        return large;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "finish",
      [](uintptr_t raw, int64_t raw_stride, uintptr_t x, int64_t x_stride, int64_t M, int64_t D, uintptr_t inv_norm,
         uintptr_t outer, float factor, int num_threads) {
        check(fastclip_cpu_finish(pointer<float>(raw), raw_stride, pointer<const float>(x), x_stride, M, D,
                                  pointer<const float>(inv_norm), pointer<const float>(outer), factor, num_threads));
      },
      py::call_guard<py::gil_scoped_release>());

  m.attr("LOSS_HEADER") = 8 * FASTCLIP_LOSS_HEADER;  // bytes of the header of `saved`
  m.attr("LOSS_ROW") = 8 * FASTCLIP_LOSS_ROW;        // bytes for every pair
  m.def(
      "loss_fwd",  // returns the loss after the last block, else 0
      [](uintptr_t saved, int64_t all, bool normalize, double scale, double image_weight, uintptr_t dot,
         int64_t row_stride, int64_t M, int64_t N, int64_t i0, int64_t j0, int num_threads) {
        const fastclip_loss loss{all, normalize, scale, image_weight, pointer<double>(saved)};
        const fastclip_block block = block_at(dot, row_stride, M, N, i0, j0);
        double value = 0.0;
        check(fastclip_cpu_loss_fwd(&loss, &block, &value, num_threads));
        return value;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "loss_bwd",  // returns d_scale of the block
      [](uintptr_t saved, int64_t all, uintptr_t dot, int64_t row_stride, int64_t M, int64_t N, int64_t i0, int64_t j0,
         int num_threads) {
        const fastclip_loss loss = loss_of(saved, all);
        const fastclip_block block = block_at(dot, row_stride, M, N, i0, j0);
        double d_scale = 0.0;
        check(fastclip_cpu_loss_bwd(&loss, &block, &d_scale, num_threads));
        return d_scale;
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("loss_factor", [](uintptr_t saved, int64_t all) {  // returns the factor, and whether any outer factor is not 1
    const fastclip_loss loss = loss_of(saved, all);
    int large = 0;
    const double factor = fastclip_cpu_loss_factor(&loss, &large);
    return std::pair<double, bool>(factor, large != 0);
  });
  m.def("resize",  // returns the pixels of the resized part (x, y, width, height), 4 bytes each
        [](const py::capsule& image, int64_t image_width, int64_t image_height, std::array<int64_t, 4> part,
           int64_t out_width, int64_t out_height, bool cubic, bool columns_first) {
          const auto [x, y, width, height] = part;
          const uint8_t* pixels = pixels_of(image, image_width, image_height);
          if (x < 0 || y < 0 || width < 1 || height < 1 || x + width > image_width || y + height > image_height ||
              out_width < 1 || out_height < 1) {
            throw std::invalid_argument("fastclip: the part is not inside the image");
          }
          const py::bytearray out(nullptr, 4 * out_width * out_height);
          auto* target = reinterpret_cast<uint8_t*>(PyByteArray_AS_STRING(out.ptr()));
          int status = FASTCLIP_OK;
          {
            const py::gil_scoped_release released;
            status = fastclip_cpu_resize(pixels + 4 * (y * image_width + x), 4 * image_width, width, height, target,
                                         out_width, out_height, cubic, columns_first);
          }
          check(status);
          return out;
        });
  m.def("select_isa", [](const char* name) { check(fastclip_cpu_select_isa(name)); });
  m.def("isa", &fastclip_cpu_isa);
  m.def("select_threads", [](const char* name) { check(fastclip_cpu_select_threads(name)); });
  m.def("threads", &fastclip_cpu_threads);
}
