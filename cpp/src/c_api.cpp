// The exported symbols: each calls its op and turns an exception into a status and a message.
#include <cstring>
#include <new>
#include <string>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "core/settled_weights.hpp"
#include "cpu/thread_pool.hpp"
#include "fastq/fastq.h"
#include "ops/dequantize.hpp"
#include "ops/flash_attention.hpp"
#include "ops/flash_decode.hpp"
#include "ops/int8_gemm.hpp"
#include "ops/kv_append.hpp"
#include "ops/llm_int8_matmul.hpp"
#include "ops/quantize.hpp"

namespace {

thread_local std::string last_error;

fastq_status fail(fastq_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();  // out of memory: the status still tells
  }
  return status;
}

template <class Call>
fastq_status guarded(const Call& call) noexcept {
  try {
    call();
    return FASTQ_SUCCESS;
  } catch (const fastq::Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(FASTQ_RUNTIME_ERROR, "out of host memory");
  } catch (const std::exception& error) {
    return fail(FASTQ_RUNTIME_ERROR, error.what());
  }
}

template <class T>
const T& required(const T* pointer, const char* what) {
  if (pointer == nullptr) fastq::invalid_value(std::string(what) + " is a null pointer");
  return *pointer;
}

}  // namespace

extern "C" {

const char* fastq_version(void) { return FASTQ_VERSION; }

const char* fastq_last_error(void) { return last_error.c_str(); }

fastq_status fastq_describe(const char** json) {
  return guarded([&] {
    required(json, "fastq_describe: json");
    static thread_local std::string text;
    const auto describe = [](fastq::DeviceType device) {
      const fastq::Backend* backend = fastq::find_backend(device);
      return backend == nullptr ? std::string("null") : backend->describe();
    };
    text = "{\"version\":\"" FASTQ_VERSION "\",\"cpu\":" + describe(fastq::DeviceType::kCpu) +
           ",\"cuda\":" + describe(fastq::DeviceType::kCuda) + "}";
    *json = text.c_str();
  });
}

fastq_status fastq_set_num_threads(int32_t num_threads) {
  return guarded([&] {
    if (num_threads < 1) {
      fastq::invalid_value("set_num_threads: num_threads is " + std::to_string(num_threads) +
                           ", expected at least 1");
    }
    fastq::cpu::set_num_threads(num_threads);
  });
}

fastq_status fastq_get_num_threads(int32_t* num_threads) {
  return guarded([&] {
    required(num_threads, "get_num_threads: num_threads");
    *num_threads = fastq::cpu::get_num_threads();
  });
}

fastq_status fastq_set_settled_weights(int32_t are_settled) {
  return guarded([&] { fastq::weights_are_settled = are_settled != 0; });
}

fastq_status fastq_get_settled_weights(int32_t* are_settled) {
  return guarded([&] {
    required(are_settled, "get_settled_weights: are_settled");
    *are_settled = fastq::weights_are_settled;
  });
}

fastq_status fastq_int8_gemm_workspace_size(const fastq_int8_gemm_args* args, size_t* bytes) {
  return guarded([&] {
    required(bytes, "int8_gemm: bytes");
    *bytes = fastq::int8_gemm_workspace_size(required(args, "int8_gemm: args"));
  });
}

fastq_status fastq_int8_gemm(const fastq_int8_gemm_args* args) {
  return guarded([&] { fastq::int8_gemm(required(args, "int8_gemm: args")); });
}

fastq_status fastq_int8_gemm_describe(const fastq_int8_gemm_args* args, char* text, size_t size) {
  return guarded([&] {
    required(text, "int8_gemm: text");
    const std::string name = fastq::int8_gemm_describe(required(args, "int8_gemm: args"));
    if (size == 0) fastq::invalid_value("int8_gemm: text has no room");
    const size_t length = name.size() < size - 1 ? name.size() : size - 1;
    std::memcpy(text, name.data(), length);
    text[length] = '\0';
  });
}

fastq_status fastq_int8_gemm_candidates(const fastq_int8_gemm_args* args, char* text, size_t size) {
  return guarded([&] {
    required(text, "int8_gemm_candidates: text");
    std::string names;
    for (const std::string& name :
         fastq::int8_gemm_candidates(required(args, "int8_gemm_candidates: args"))) {
      if (!names.empty()) names += '\n';
      names += name;
    }
    if (size <= names.size()) {
      fastq::invalid_value("int8_gemm_candidates: text has room for " + std::to_string(size) +
                           " bytes, expected " + std::to_string(names.size() + 1));
    }
    std::memcpy(text, names.c_str(), names.size() + 1);
  });
}

fastq_status fastq_pack_weight_size(const fastq_weight* plain, size_t* bytes) {
  return guarded([&] {
    required(bytes, "pack_weight: bytes");
    *bytes = fastq::pack_weight_size(required(plain, "pack_weight: b"));
  });
}

fastq_status fastq_pack_weight(const fastq_weight* plain, const fastq_tensor* packed) {
  return guarded([&] {
    fastq::pack_weight(required(plain, "pack_weight: b"), required(packed, "pack_weight: packed"));
  });
}

fastq_status fastq_quantize_per_token(const fastq_quantize_args* args) {
  return guarded([&] { fastq::quantize_per_token(required(args, "quantize_per_token: args")); });
}

fastq_status fastq_quantize_per_channel(const fastq_quantize_args* args) {
  return guarded(
      [&] { fastq::quantize_per_channel(required(args, "quantize_per_channel: args")); });
}

fastq_status fastq_llm_int8_matmul_workspace_size(const fastq_llm_int8_matmul_args* args,
                                                  size_t* bytes) {
  return guarded([&] {
    required(bytes, "llm_int8_matmul: bytes");
    *bytes = fastq::llm_int8_matmul_workspace_size(required(args, "llm_int8_matmul: args"));
  });
}

fastq_status fastq_llm_int8_matmul(const fastq_llm_int8_matmul_args* args) {
  return guarded([&] { fastq::llm_int8_matmul(required(args, "llm_int8_matmul: args")); });
}

fastq_status fastq_norm_quant(const fastq_norm_quant_args* args) {
  return guarded([&] { fastq::norm_quant(required(args, "norm_quant: args")); });
}

fastq_status fastq_activation_quant(const fastq_activation_quant_args* args) {
  return guarded([&] { fastq::activation_quant(required(args, "activation_quant: args")); });
}

fastq_status fastq_dequantize(const fastq_dequantize_args* args) {
  return guarded([&] { fastq::dequantize(required(args, "dequantize: args")); });
}

fastq_status fastq_flash_attention_workspace_size(const fastq_flash_attention_args* args,
                                                  size_t* bytes) {
  return guarded([&] {
    required(bytes, "flash_attention: bytes");
    *bytes = fastq::flash_attention_workspace_size(required(args, "flash_attention: args"));
  });
}

fastq_status fastq_flash_attention(const fastq_flash_attention_args* args) {
  return guarded([&] { fastq::flash_attention(required(args, "flash_attention: args")); });
}

fastq_status fastq_flash_decode_workspace_size(const fastq_flash_decode_args* args, size_t* bytes) {
  return guarded([&] {
    required(bytes, "flash_decode: bytes");
    *bytes = fastq::flash_decode_workspace_size(required(args, "flash_decode: args"));
  });
}

fastq_status fastq_flash_decode(const fastq_flash_decode_args* args) {
  return guarded([&] { fastq::flash_decode(required(args, "flash_decode: args")); });
}

fastq_status fastq_kv_append(const fastq_kv_append_args* args) {
  return guarded([&] { fastq::kv_append(required(args, "kv_append: args")); });
}

}  // extern "C"
