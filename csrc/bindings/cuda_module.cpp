// Python binding of the Hopper kernels: addresses in, messages out. Shapes and dtypes are the caller's business
// (fastclip/_backends/cuda.py); this file knows neither torch nor CUDA.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../fastclip.h"
#include "address.h"

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
  m.def("driver", &fastclip_cuda_driver);
  m.attr("RUNTIME") = fastclip_cuda_runtime();
  m.attr("COMPILER") = FASTCLIP_CUDA_COMPILER;
  m.attr("ARCHS") = FASTCLIP_CUDA_ARCHS;
#ifdef FASTCLIP_EMULATE
  m.attr("EMULATED") = true;  // csrc/tests/emulate_sm90.h: for tests
#else
  m.attr("EMULATED") = false;
#endif
  m.attr("TILE_M") = static_cast<int>(FASTCLIP_CUDA_TILE_M);
  m.attr("TILE_N") = static_cast<int>(FASTCLIP_CUDA_TILE_N);
  m.attr("TILE_N_LABELS") = static_cast<int>(FASTCLIP_CUDA_TILE_N_LABELS);
  m.attr("TILE_N_SMALL") = static_cast<int>(FASTCLIP_CUDA_TILE_N_SMALL);
}
