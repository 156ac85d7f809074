#include "tensor.hpp"

#include <cstring>
#include <string>
#include <utility>

#include "dlpack.hpp"

namespace fastq_python {
namespace {

// torch.Tensor's C exchange table, or null where this torch has none. Looked up once per type: the
// types that come here are torch.Tensor and now and then torch.nn.Parameter.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* known_type = nullptr;
  static const dlpack::ExchangeApi* known_api = nullptr;
  if (type == known_type) return known_api;
  const dlpack::ExchangeApi* api = nullptr;
  py::object capsule = py::getattr(py::handle(reinterpret_cast<PyObject*>(type)),
                                   "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_CheckExact(capsule.ptr())) {
    const char* name = PyCapsule_GetName(capsule.ptr());
    api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), name));
    if (api != nullptr && api->header.version.major != 1) api = nullptr;
  }
  PyErr_Clear();
  known_type = type;
  known_api = api;
  return api;
}

int32_t dtype_from_dlpack(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return FASTQ_DTYPE_NONE;
  switch (dtype.code << 8 | dtype.bits) {
    case dlpack::kInt << 8 | 8:
      return FASTQ_INT8;
    case dlpack::kInt << 8 | 32:
      return FASTQ_INT32;
    case dlpack::kUInt << 8 | 8:
      return FASTQ_UINT8;
    case dlpack::kFloat << 8 | 32:
      return FASTQ_FLOAT32;
    case dlpack::kFloat << 8 | 16:
      return FASTQ_FLOAT16;
    case dlpack::kBfloat << 8 | 16:
      return FASTQ_BFLOAT16;
    default:
      return FASTQ_DTYPE_NONE;
  }
}

// The attributes of the torch module that the slow path and the allocator use.
struct Torch {
  py::object tensor_type, empty, uint8, current_raw_stream;
  py::object dtypes[7];
};

const Torch& torch() {
  // Leaked on purpose: it must outlive every other static.
  static const Torch* cached = [] {
    auto* t = new Torch;
    py::module_ module = py::module_::import("torch");
    t->tensor_type = module.attr("Tensor");
    t->empty = module.attr("empty");
    t->uint8 = module.attr("uint8");
    t->current_raw_stream = py::getattr(module.attr("_C"), "_cuda_getCurrentRawStream", py::none());
    t->dtypes[FASTQ_FLOAT32] = module.attr("float32");
    t->dtypes[FASTQ_FLOAT16] = module.attr("float16");
    t->dtypes[FASTQ_BFLOAT16] = module.attr("bfloat16");
    t->dtypes[FASTQ_INT8] = module.attr("int8");
    t->dtypes[FASTQ_INT32] = module.attr("int32");
    t->dtypes[FASTQ_UINT8] = module.attr("uint8");
    return t;
  }();
  return *cached;
}

[[noreturn]] void refuse(const char* op, const char* name, const std::string& what) {
  throw py::type_error(std::string(op) + ": " + name + " " + what);
}

std::string dtype_text(py::handle object) {
  const std::string text = py::str(object.attr("dtype"));
  return text.rfind("torch.", 0) == 0 ? text.substr(6) : text;
}

void set_device(fastq_tensor& view, int device_type, int index, const char* op, const char* name,
                py::handle object) {
  if (device_type == dlpack::kCUDA) {
    view.device_type = FASTQ_CUDA;
    view.device_index = index;
  } else if (device_type == dlpack::kCPU || device_type == dlpack::kCUDAHost) {
    view.device_type = FASTQ_CPU;
  } else {
    refuse(
        op, name,
        "is on " + std::string(py::str(object.attr("device"))) + ", expected a cpu or cuda device");
  }
}

void check_rank(int rank, const char* op, const char* name) {
  if (rank > FASTQ_MAX_RANK) {
    throw py::value_error(std::string(op) + ": " + name + " has rank " + std::to_string(rank) +
                          ", expected at most " + std::to_string(FASTQ_MAX_RANK));
  }
}

fastq_tensor view_from_exchange(const dlpack::ExchangeApi& api, py::handle object, const char* op,
                                const char* name) {
  dlpack::Tensor source;
  if (api.tensor_from_py_object(object.ptr(), &source) != 0) throw py::error_already_set();
  check_rank(source.ndim, op, name);
  fastq_tensor view = {};
  view.data = static_cast<char*>(source.data) + source.byte_offset;
  view.dtype = dtype_from_dlpack(source.dtype);
  set_device(view, source.device.device_type, source.device.device_id, op, name, object);
  view.rank = source.ndim;
  int64_t stride = 1;
  for (int i = source.ndim - 1; i >= 0; --i) {
    view.sizes[i] = source.shape[i];
    view.strides[i] = source.strides != nullptr ? source.strides[i] : stride;
    stride *= source.shape[i];
  }
  return view;
}

fastq_tensor view_from_attributes(py::handle object, const char* op, const char* name) {
  fastq_tensor view = {};
  view.dtype = dtype_of(object.attr("dtype"));
  if (object.attr("is_cuda").ptr() == Py_True) {
    set_device(view, dlpack::kCUDA, py::cast<int>(object.attr("get_device")()), op, name, object);
  } else {
    const bool is_cpu = object.attr("is_cpu").ptr() == Py_True;
    set_device(view, is_cpu ? dlpack::kCPU : 0, 0, op, name, object);
  }
  view.data = PyLong_AsVoidPtr(object.attr("data_ptr")().ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  const py::tuple sizes = object.attr("shape"), strides = object.attr("stride")();
  check_rank(static_cast<int>(sizes.size()), op, name);
  view.rank = static_cast<int32_t>(sizes.size());
  for (int i = 0; i < view.rank; ++i) {
    view.sizes[i] = PyLong_AsLongLong(sizes[i].ptr());
    view.strides[i] = PyLong_AsLongLong(strides[i].ptr());
  }
  return view;
}

}  // namespace

fastq_tensor view_of(py::handle object, const char* op, const char* name) {
  if (object.is_none()) return {};
  PyTypeObject* type = Py_TYPE(object.ptr());
  const dlpack::ExchangeApi* api = exchange_api(type);
  if (api == nullptr && !py::isinstance(object, torch().tensor_type)) {
    refuse(op, name, std::string("is a ") + type->tp_name + ", expected a torch.Tensor");
  }
  const fastq_tensor view = api != nullptr ? view_from_exchange(*api, object, op, name)
                                           : view_from_attributes(object, op, name);
  if (view.dtype == FASTQ_DTYPE_NONE) {
    refuse(op, name,
           "has dtype " + dtype_text(object) +
               ", expected float32, float16, bfloat16, int8, int32 or uint8");
  }
  return view;
}

fastq_kv_cache cache_of(const char* op, py::handle k_cache, py::handle v_cache,
                        py::handle cache_seqlens, py::handle block_table, py::handle k_scale,
                        py::handle v_scale) {
  fastq_kv_cache cache = {};
  cache.struct_size = sizeof(cache);
  cache.k = view_of(k_cache, op, "k_cache"), cache.v = view_of(v_cache, op, "v_cache");
  cache.k_scale = view_of(k_scale, op, "k_scale"), cache.v_scale = view_of(v_scale, op, "v_scale");
  cache.seqlens = view_of(cache_seqlens, op, "cache_seqlens");
  cache.block_table = view_of(block_table, op, "block_table");
  return cache;
}

void* current_stream(const fastq_tensor& tensor, py::handle object) {
  if (tensor.device_type != FASTQ_CUDA) return nullptr;
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  void* stream = nullptr;
  if (api != nullptr) {
    if (api->current_work_stream(dlpack::kCUDA, tensor.device_index, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  stream = PyLong_AsVoidPtr(torch().current_raw_stream(tensor.device_index).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return stream;
}

void check(fastq_status status) {
  switch (status) {
    case FASTQ_SUCCESS:
      return;
    case FASTQ_INVALID_VALUE:
      throw py::value_error(fastq_last_error());
    case FASTQ_INVALID_TYPE:
      throw py::type_error(fastq_last_error());
    case FASTQ_NOT_IMPLEMENTED:
      PyErr_SetString(PyExc_NotImplementedError, fastq_last_error());
      throw py::error_already_set();
    case FASTQ_RUNTIME_ERROR:
      break;
  }
  throw std::runtime_error(fastq_last_error());
}

namespace {
PyObject* grad_mode = nullptr;    // torch.is_grad_enabled
PyObject* mode_probes = nullptr;  // a tuple; null: never call directly

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool is_true(py::handle object, PyObject* attribute) {
  return checked(PyObject_GetAttr(object.ptr(), attribute)).ptr() == Py_True;
}
}  // namespace

void set_mode_probes(py::object is_grad_enabled, py::tuple probes) {
  grad_mode = is_grad_enabled.release().ptr();
  mode_probes = probes.release().ptr();
}

bool is_direct(const py::handle* tensors, size_t count) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_meta = PyUnicode_InternFromString("is_meta");
  if (mode_probes == nullptr) return false;
  const PyObject* plain = torch().tensor_type.ptr();
  for (size_t i = 0; i < count; ++i) {
    if (tensors[i].is_none()) continue;
    if (reinterpret_cast<PyObject*>(Py_TYPE(tensors[i].ptr())) != plain) return false;
  }
  if (tensors[0].is_none() || is_true(tensors[0], is_meta)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(mode_probes); ++i) {
    const py::object found = checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(mode_probes, i)));
    if (PyObject_IsTrue(found.ptr()) != 0) return false;
  }
  if (checked(PyObject_CallNoArgs(grad_mode)).ptr() != Py_True) return true;
  for (size_t i = 0; i < count; ++i) {
    if (!tensors[i].is_none() && is_true(tensors[i], requires_grad)) return false;
  }
  return true;
}

void* TorchWorkspace::allocate(void* self, size_t bytes) noexcept {
  const py::gil_scoped_acquire acquire;
  auto& workspace = *static_cast<TorchWorkspace*>(self);
  try {
    workspace.held = fastq_python::allocate(bytes, workspace.like);
    return view_of(workspace.held, workspace.op, "workspace").data;
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable(workspace.op);
    return nullptr;
  }
}

fastq_dtype dtype_of(py::handle torch_dtype) {
  for (int i = FASTQ_FLOAT32; i <= FASTQ_UINT8; ++i) {
    if (torch_dtype.is(torch().dtypes[i])) return static_cast<fastq_dtype>(i);
  }
  return FASTQ_DTYPE_NONE;
}

fastq_activation activation_of(py::handle name, const char* op) {
  if (name.is_none()) return FASTQ_ACTIVATION_NONE;
  const std::pair<const char*, fastq_activation> known[] = {
      {"relu", FASTQ_ACTIVATION_RELU},
      {"gelu", FASTQ_ACTIVATION_GELU},
      {"gelu_tanh", FASTQ_ACTIVATION_GELU_TANH},
      {"silu", FASTQ_ACTIVATION_SILU}};
  const std::string text = py::str(name);
  for (const auto& [known_name, value] : known) {
    if (text == known_name) return value;
  }
  throw py::value_error(std::string(op) + ": activation is " + text +
                        ", expected None, relu, gelu, gelu_tanh or silu");
}

py::object allocate(const int64_t* sizes, int rank, fastq_dtype dtype, py::handle like) {
  static PyObject* const device = PyUnicode_InternFromString("device");
  static PyObject* const keywords = Py_BuildValue("(sO)", "dtype", device);
  const py::tuple shape(rank);
  for (int i = 0; i < rank; ++i) PyTuple_SET_ITEM(shape.ptr(), i, PyLong_FromLongLong(sizes[i]));
  const py::object where = checked(PyObject_GetAttr(like.ptr(), device));
  PyObject* const arguments[] = {shape.ptr(), torch().dtypes[dtype].ptr(), where.ptr()};
  return checked(PyObject_Vectorcall(torch().empty.ptr(), arguments, 1, keywords));
}

py::object allocate(size_t bytes, py::handle like) {
  return torch().empty(bytes, py::arg("dtype") = torch().uint8,
                       py::arg("device") = like.attr("device"));
}

}  // namespace fastq_python
