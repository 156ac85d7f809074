// Computes one decoder layer of a quantised checkpoint: a prompt at once, then token by token.
//
//   decoder_layer CHECKPOINT LAYER INPUT OUTPUT [--device cpu|cuda]
//
// INPUT is a safetensors file of hidden states in the checkpoint's float dtype: `prompt` (batch,
// seqlen, hidden_size) and `steps` (num_steps, batch, 1, hidden_size), what enters the layer for
// the prompt and for each token after it. OUTPUT gets what leaves it, under the same names.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "checkpoint.hpp"
#include "decoder_layer.hpp"
#include "kv_cache.hpp"
#include "safetensors.hpp"
#include "tensor.hpp"

static fastq::Device parse_device(const std::string& name) {
  if (name == "cpu") return {FASTQ_CPU, 0};
  if (name == "cuda") return {FASTQ_CUDA, 0};
  throw std::invalid_argument("--device is " + name + ", expected cpu or cuda");
}

static void run(const std::string& folder, int layer_number, const std::string& input_file,
                const std::string& output_file, fastq::Device device) {
  const Checkpoint checkpoint(folder);
  const SafetensorsFile input(input_file);
  const Tensor prompt = input.read("prompt").to(device);
  const Tensor steps = input.read("steps").to(device);
  const int64_t hidden_size = checkpoint.config().hidden_size;
  const int64_t batch = prompt.view().sizes[0], seqlen = prompt.view().sizes[1];
  const int64_t num_steps = steps.view().sizes[0];
  if (batch * seqlen == 0 || prompt.sizes() != std::vector{batch, seqlen, hidden_size}) {
    throw std::invalid_argument("prompt must be (batch, seqlen, hidden_size), and not empty");
  }
  if (steps.sizes() != std::vector{num_steps, batch, int64_t{1}, hidden_size}) {
    throw std::invalid_argument("steps must be (num_steps, batch, 1, hidden_size)");
  }

  DecoderLayer layer(checkpoint, layer_number, batch * seqlen, device);
  KVCache cache(checkpoint.config(), batch, seqlen + num_steps, prompt.dtype(), device);
  layer.forward(prompt.view(), cache);
  for (int64_t i = 0; i < num_steps; ++i) layer.forward(element(steps.view(), i), cache);

  const fastq::Device host;
  write_safetensors(output_file, {{"prompt", prompt.to(host)}, {"steps", steps.to(host)}});
}

int main(int argc, char** argv) try {
  if (argc != 5 && !(argc == 7 && std::string(argv[5]) == "--device")) {
    std::fprintf(stderr, "usage: %s CHECKPOINT LAYER INPUT OUTPUT [--device cpu|cuda]\n", argv[0]);
    return 2;
  }
  run(argv[1], std::stoi(argv[2]), argv[3], argv[4], parse_device(argc == 7 ? argv[6] : "cpu"));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "decoder_layer: %s\n", error.what());
  return 1;
}
