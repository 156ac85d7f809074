// Errors inside the library are exceptions; c_api.cpp turns them into a status and a message.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "fastq/fastq.h"

namespace fastq {

class Error : public std::exception {
 public:
  Error(fastq_status status, std::string message) : status_(status), message_(std::move(message)) {}
  fastq_status status() const noexcept { return status_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  fastq_status status_;
  std::string message_;
};

[[noreturn]] inline void invalid_value(const std::string& message) {
  throw Error(FASTQ_INVALID_VALUE, message);
}
[[noreturn]] inline void invalid_type(const std::string& message) {
  throw Error(FASTQ_INVALID_TYPE, message);
}
[[noreturn]] inline void not_implemented(const std::string& message) {
  throw Error(FASTQ_NOT_IMPLEMENTED, message);
}
[[noreturn]] inline void runtime_error(const std::string& message) {
  throw Error(FASTQ_RUNTIME_ERROR, message);
}

}  // namespace fastq
