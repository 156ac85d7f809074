// fastq._core: libfastq on torch tensors. Every function takes tensors that exist already and
// enters the library by its C ABI, as any other program would.
#include <string>
#include <vector>

#include "tensor.hpp"

PYBIND11_MODULE(_core, module) {
  namespace fp = fastq_python;
  namespace py = pybind11;
  module.doc() = "The kernels of libfastq on torch tensors.";
  module.def("version", &fastq_version);
  module.def("describe", [] {
    const char* json = nullptr;
    fp::check(fastq_describe(&json));
    return std::string(json);
  });
  module.def("set_num_threads",
             [](int num_threads) { fp::check(fastq_set_num_threads(num_threads)); });
  module.def("get_num_threads", [] {
    int32_t num_threads = 0;
    fp::check(fastq_get_num_threads(&num_threads));
    return num_threads;
  });
  module.def("set_settled_weights", [](bool are_settled) {
    int32_t before = 0;
    fp::check(fastq_get_settled_weights(&before));
    fp::check(fastq_set_settled_weights(are_settled));
    return before != 0;
  });
  module.def("set_mode_probes", &fp::set_mode_probes);
  module.def("is_direct", [](const py::args& tensors) {
    std::vector<py::handle> handles(tensors.begin(), tensors.end());
    return fp::is_direct(handles.data(), handles.size());
  });
  fp::bind_int8_gemm(module);
  fp::bind_quantize(module);
  fp::bind_dequantize(module);
  fp::bind_flash_attention(module);
  fp::bind_flash_decode(module);
  fp::bind_kv_append(module);
  fp::bind_llm_int8_matmul(module);
}
