// What every benchmark's command line takes, and the JSON line of a case.
#pragma once

#include <cstdio>
#include <ctime>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>

#include "device.hpp"
#include "fastq/fastq.hpp"
#include "shapes.hpp"
#include "timing.hpp"

namespace bench {

struct Options {
  std::string op;
  bool cuda = false;
  std::string shapes;
  std::string out;
  std::string commit = "unknown";
  int rounds = 25;
};

// `take_own` takes an option that only this benchmark has; false where it has no such option.
using TakeOwn = std::function<bool(const std::string& name, const std::string& value)>;

inline Options parse(const std::string& op, int argc, char** argv, const TakeOwn& take_own) {
  Options options;
  options.op = op;
  options.shapes = "bench/shapes/" + op + ".json";
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::runtime_error(name + " needs a value");
    const std::string value = argv[i + 1];
    if (name == "--device" && (value == "cpu" || value == "cuda")) {
      options.cuda = value == "cuda";
    } else if (name == "--shapes") {
      options.shapes = value;
    } else if (name == "--out") {
      options.out = value;
    } else if (name == "--commit") {
      options.commit = value;
    } else if (name == "--rounds") {
      options.rounds = std::stoi(value);
    } else if (!take_own(name, value)) {
      throw std::runtime_error("unknown option " + name + " " + value);
    }
  }
#ifndef FASTQ_BENCH_CUDA
  if (options.cuda) throw std::runtime_error("this build has no CUDA backend");
#endif
  return options;
}

// What one implementation took for one shape.
struct Result {
  Shape shape;
  std::string dtype, implementation, config;  // no config: empty
  Timing timing;
  size_t copies;
  double rate;
  std::string unit;
};

// Appends the line to the file that the options name, if they do.
inline void append(const Options& options, const Result& result) {
  if (options.out.empty()) return;
  char stamp[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  std::string sizes;
  for (const auto& [name, size] : result.shape.sizes) {
    sizes += (sizes.empty() ? "\"" : ", \"") + name + "\": " + std::to_string(size);
  }
  const std::string config = result.config.empty() ? "null" : "\"" + result.config + "\"";
  std::FILE* file = std::fopen(options.out.c_str(), "a");
  if (file == nullptr) throw std::runtime_error("cannot write " + options.out);
  std::fprintf(file,
               "{\"time\": \"%s\", \"commit\": \"%s\", \"device\": \"%s\", \"fastq\": \"%s\", "
               "\"threads\": %d, \"op\": \"%s\", \"tag\": \"%s\", \"shape\": {%s}, "
               "\"dtype\": \"%s\", \"implementation\": \"%s\", \"config\": %s, \"p10_us\": %.3f, "
               "\"p50_us\": %.3f, \"p90_us\": %.3f, \"timer\": \"%s\", \"copies\": %zu, "
               "\"rate\": %.3f, \"unit\": \"%s\", \"peer\": null, \"ratio\": null}\n",
               stamp, options.commit.c_str(), device_name(options.cuda).c_str(), fastq_version(),
               fastq::get_num_threads(), options.op.c_str(), result.shape.tag.c_str(),
               sizes.c_str(), result.dtype.c_str(), result.implementation.c_str(), config.c_str(),
               result.timing.p10_us, result.timing.p50_us, result.timing.p90_us,
               options.cuda ? "cuda graph" : "steady_clock", result.copies, result.rate,
               result.unit.c_str());
  std::fclose(file);
}

// The exit status of a benchmark.
inline int run_program(const std::string& op, const std::function<void()>& benchmark) {
  try {
    benchmark();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_%s: %s\n", op.c_str(), error.what());
    return 1;
  }
  return 0;
}

}  // namespace bench
