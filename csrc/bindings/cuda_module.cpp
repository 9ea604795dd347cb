// Python binding of the Hopper kernels. It takes addresses and turns error codes into exceptions. The caller
// (fastclip/_backends/cuda.py) checks shapes and dtypes; this file uses neither torch nor CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../fastclip.h"
#include "address.h"

#ifdef FASTCLIP_EMULATE
extern "C" int fastclip_emulated_launches();
#endif

namespace py = pybind11;

namespace {

void check(int status) {
  if (status == FASTCLIP_OK) return;
  if (status == FASTCLIP_NO_DRIVER)
    throw std::runtime_error("fastclip: there is no NVIDIA driver, or it is too old for this build of fastclip._cuda");
  if (status >= FASTCLIP_CUDA_ERROR)
    throw std::runtime_error(std::string("fastclip: a CUDA kernel could not be started: ") +
                             fastclip_cuda_error_name(status));
  throw std::invalid_argument("fastclip: the native code refused its arguments (status " + std::to_string(status) +
                              ")");
}

// The problem of a loss of pairs, as a tuple and not as a class with names, because a training step on few rows waits
// for the host. Its elements: image, text and their row strides; the rows that the products read and their strides; N,
// D; half, normalize; scale, image_weight; workspace, processors, device, stream.
using Loss = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t,
                        int64_t, bool, bool, uintptr_t, double, int64_t, int, int, uintptr_t>;

template <int kCount>
using Addresses = std::array<uintptr_t, kCount>;  // 0: not needed

fastclip_cuda_loss loss_of(const Loss& x) {
  return {pointer<const void>(std::get<0>(x)),
          pointer<const void>(std::get<1>(x)),
          std::get<2>(x),
          std::get<3>(x),
          pointer<void>(std::get<4>(x)),
          pointer<void>(std::get<5>(x)),
          std::get<6>(x),
          std::get<7>(x),
          std::get<8>(x),
          std::get<9>(x),
          std::get<10>(x) ? FASTCLIP_FP16 : FASTCLIP_BF16,
          std::get<11>(x),
          pointer<const float>(std::get<12>(x)),
          std::get<13>(x),
          std::get<14>(x),
          std::get<15>(x),
          std::get<16>(x),
          pointer<void>(std::get<17>(x))};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastclip's Hopper kernels (csrc/cuda). Internal: use fastclip.contrastive_loss.";

  // module_local: the emulated module of the tests binds the same structs in the same process
  py::class_<fastclip_cuda_block>(m, "Block", py::module_local())
      .def(py::init([](uintptr_t image, uintptr_t text, int64_t image_row_stride, int64_t text_row_stride, int64_t M,
                       int64_t N, int64_t D, int64_t offset, bool exclude_self, bool half, int tile_n, int processors,
                       uintptr_t constants, uintptr_t stream) {
             return fastclip_cuda_block{pointer<const void>(image),
                                        pointer<const void>(text),
                                        image_row_stride,
                                        text_row_stride,
                                        M,
                                        N,
                                        D,
                                        offset,
                                        exclude_self,
                                        half ? FASTCLIP_FP16 : FASTCLIP_BF16,
                                        tile_n,
                                        processors,
                                        pointer<const float>(constants),
                                        pointer<void>(stream)};
           }),
           py::kw_only(), py::arg("image"), py::arg("text"), py::arg("image_row_stride"), py::arg("text_row_stride"),
           py::arg("M"), py::arg("N"), py::arg("D"), py::arg("offset"), py::arg("exclude_self"), py::arg("half"),
           py::arg("tile_n"), py::arg("processors"), py::arg("constants"), py::arg("stream"));
  py::class_<fastclip_cuda_fwd_side>(m, "FwdSide", py::module_local())
      .def(py::init([](uintptr_t factor, uintptr_t label, uintptr_t part) {
             return fastclip_cuda_fwd_side{pointer<const float>(factor), pointer<const int32_t>(label),
                                           pointer<float>(part)};
           }),
           py::kw_only(), py::arg("factor"), py::arg("label"), py::arg("part"));
  py::class_<fastclip_cuda_bwd_side>(m, "BwdSide", py::module_local())
      .def(py::init([](uintptr_t factor, uintptr_t neg, uintptr_t label, uintptr_t pos, uintptr_t own) {
             return fastclip_cuda_bwd_side{pointer<const float>(factor), pointer<const float>(neg),
                                           pointer<const int32_t>(label), pointer<const float>(pos),
                                           pointer<const float>(own)};
           }),
           py::kw_only(), py::arg("factor"), py::arg("neg"), py::arg("label"), py::arg("pos"), py::arg("own"));

  m.def("contrastive_fwd",
        [](const fastclip_cuda_block& block, const fastclip_cuda_fwd_side& image, const fastclip_cuda_fwd_side& text) {
          check(fastclip_cuda_contrastive_fwd(&block, &image, &text));
        });
  m.def("contrastive_bwd",
        [](const fastclip_cuda_block& block, const fastclip_cuda_bwd_side& image, const fastclip_cuda_bwd_side& text,
           uintptr_t weights, int64_t weights_row_stride, uintptr_t scale_part) {
          check(fastclip_cuda_contrastive_bwd(&block, &image, &text, pointer<void>(weights), weights_row_stride,
                                              pointer<float>(scale_part)));
        });
  m.def("sigmoid_fwd",
        [](const fastclip_cuda_block& block, uintptr_t image_factor, uintptr_t text_factor, uintptr_t bias,
           bool gradients, uintptr_t weights, int64_t weights_row_stride, uintptr_t part, int64_t part_row_stride) {
          check(fastclip_cuda_sigmoid_fwd(&block, pointer<const float>(image_factor), pointer<const float>(text_factor),
                                          pointer<const float>(bias), gradients, pointer<void>(weights),
                                          weights_row_stride, pointer<double>(part), part_row_stride));
        });
  m.def("loss_plan", [](int64_t N, int64_t D, int64_t workspace, int processors) {
    fastclip_cuda_loss_sizes s;
    check(fastclip_cuda_loss_plan(N, D, workspace, processors, &s));
    return std::make_tuple(s.saved, s.work, s.rows, s.chunks, s.stride, s.extra, s.sigmoid, s.columns);
  });
  m.def("loss_forward", [](const Loss& problem, uintptr_t saved, uintptr_t work, uintptr_t loss) {
    const fastclip_cuda_loss p = loss_of(problem);
    check(fastclip_cuda_loss_forward(&p, pointer<void>(saved), pointer<void>(work), pointer<float>(loss)));
  });
  m.def("loss_weights", [](const Loss& problem, uintptr_t saved, uintptr_t weights, int64_t chunk, int64_t column) {
    const fastclip_cuda_loss p = loss_of(problem);
    check(fastclip_cuda_loss_weights(&p, pointer<const void>(saved), pointer<void>(weights), chunk, column));
  });
  m.def("loss_finish",
        [](const Loss& problem, uintptr_t saved, uintptr_t weights, int64_t chunk, uintptr_t upstream,
           uintptr_t raw_image, uintptr_t raw_text, uintptr_t d_image, uintptr_t d_text, uintptr_t d_scale) {
          const fastclip_cuda_loss p = loss_of(problem);
          check(fastclip_cuda_loss_finish(&p, pointer<const void>(saved), pointer<void>(weights), chunk,
                                          pointer<const float>(upstream), pointer<const float>(raw_image),
                                          pointer<const float>(raw_text), pointer<void>(d_image), pointer<void>(d_text),
                                          pointer<float>(d_scale)));
        });
  m.def("sigmoid_weights", [](const Loss& problem, uintptr_t bias, uintptr_t work, int64_t chunk, int64_t column,
                              bool gradients) {
    const fastclip_cuda_loss p = loss_of(problem);
    check(fastclip_cuda_sigmoid_weights(&p, pointer<const float>(bias), pointer<void>(work), chunk, column, gradients));
  });
  m.def("sigmoid_finish", [](const Loss& problem, uintptr_t bias, uintptr_t work, int64_t chunk, double divisor,
                             uintptr_t loss, bool wide, uintptr_t d_image, uintptr_t d_text, uintptr_t d_scalars) {
    const fastclip_cuda_loss p = loss_of(problem);
    check(fastclip_cuda_sigmoid_finish(&p, pointer<const float>(bias), pointer<void>(work), chunk, divisor,
                                       pointer<void>(loss), wide, pointer<void>(d_image), pointer<void>(d_text),
                                       pointer<float>(d_scalars)));
  });
  // kept: gradients of image, text, scale and bias. d: outputs in the same order.
  m.def("sigmoid_bwd", [](uintptr_t upstream, const Addresses<4>& kept, const Addresses<4>& d, int64_t image_count,
                          int64_t text_count, bool half, int device, uintptr_t stream) {
    const fastclip_cuda_factors p = {pointer<const float>(upstream),
                                     pointer<const void>(kept[0]),
                                     pointer<const void>(kept[1]),
                                     pointer<const float>(kept[2]),
                                     pointer<const float>(kept[3]),
                                     pointer<void>(d[0]),
                                     pointer<void>(d[1]),
                                     pointer<float>(d[2]),
                                     pointer<float>(d[3]),
                                     image_count,
                                     text_count,
                                     half ? FASTCLIP_FP16 : FASTCLIP_BF16,
                                     device,
                                     pointer<void>(stream)};
    check(fastclip_cuda_sigmoid_bwd(&p));
  });
  m.def("driver", &fastclip_cuda_driver);
  m.attr("RUNTIME") = fastclip_cuda_runtime();
  m.attr("COMPILER") = FASTCLIP_CUDA_COMPILER;
  m.attr("ARCHS") = FASTCLIP_CUDA_ARCHS;
#ifdef FASTCLIP_EMULATE
  m.attr("EMULATED") = true;                       // by csrc/tests/emulate_sm90.h, for tests
  m.def("launches", &fastclip_emulated_launches);  // number of launches since the last call
#else
  m.attr("EMULATED") = false;
#endif
  m.attr("TILE_M") = static_cast<int>(FASTCLIP_CUDA_TILE_M);
  m.attr("TILE_N") = static_cast<int>(FASTCLIP_CUDA_TILE_N);
  m.attr("TILE_N_LABELS") = static_cast<int>(FASTCLIP_CUDA_TILE_N_LABELS);
  m.attr("TILE_N_SMALL") = static_cast<int>(FASTCLIP_CUDA_TILE_N_SMALL);
}
