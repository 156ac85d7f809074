#include "checkpoint.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

using nlohmann::json;

// An entry, or what stands for it where it is absent or null.
template <class T>
static T entry(const json& object, const char* name, T otherwise) {
  const auto found = object.find(name);
  return found == object.end() || found->is_null() ? otherwise : found->template get<T>();
}

static void expect(const json& object, const char* name, const json& expected,
                   const json& otherwise = nullptr) {
  const json value = entry(object, name, otherwise);
  if (value != expected) {
    throw std::runtime_error("config.json: " + std::string(name) + " is " + value.dump() +
                             ", expected " + expected.dump());
  }
}

static int64_t size(const json& object, const char* name, int64_t otherwise = 0) {
  const int64_t value = entry(object, name, otherwise);
  if (value > 0) return value;
  throw std::runtime_error("config.json: " + std::string(name) + " is absent or not positive");
}

static Config read_config(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path.string() + " cannot be read");
  const json raw = json::parse(file);

  expect(raw, "model_type", "llama");
  expect(raw, "hidden_act", "silu", "silu");
  expect(raw, "attention_bias", false, false);
  expect(raw, "mlp_bias", false, false);
  // transformers 5 writes rope_parameters; before, rope_theta, and rope_scaling if there is any.
  const json rope = entry(raw, "rope_parameters", raw);
  expect(rope, "rope_type", "default", "default");
  expect(rope, "partial_rotary_factor", 1.0, 1.0);
  expect(raw, "rope_scaling", nullptr);

  const json& quantization = raw.at("quantization_config");
  expect(quantization, "format", "int-quantized");
  for (const json& group : quantization.at("config_groups")) {
    const json& activations = group.at("input_activations");  // one scale a token, found anew
    expect(activations, "strategy", "token");
    expect(activations, "dynamic", true);
  }

  Config config;
  config.hidden_size = size(raw, "hidden_size");
  config.intermediate_size = size(raw, "intermediate_size");
  config.num_heads = size(raw, "num_attention_heads");
  config.num_heads_k = size(raw, "num_key_value_heads", config.num_heads);
  config.head_dim = size(raw, "head_dim", config.hidden_size / config.num_heads);
  config.norm_eps = entry(raw, "rms_norm_eps", 1e-6f);
  config.rope_theta = entry(rope, "rope_theta", 1e4);
  return config;
}

Checkpoint::Checkpoint(const std::filesystem::path& folder)
    : config_(read_config(folder / "config.json")) {
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    if (file.path().extension() == ".safetensors") files_.emplace_back(file.path());
  }
}

Tensor Checkpoint::read(const std::string& name, const std::vector<int64_t>& sizes) const {
  for (const SafetensorsFile& file : files_) {
    if (!file.contains(name)) continue;
    Tensor tensor = file.read(name);
    if (tensor.sizes() == sizes) return tensor;
    throw std::runtime_error(name + " has shape " + json(tensor.sizes()).dump() + ", expected " +
                             json(sizes).dump());
  }
  throw std::runtime_error(name + " is in none of the checkpoint's files");
}
