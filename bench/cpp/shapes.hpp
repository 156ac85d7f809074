// The shapes files, read as bench/results.py reads them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace bench {

using Sizes = std::vector<std::pair<std::string, int64_t>>;  // in the file's order

struct Shape {
  Sizes sizes;
  std::string tag;
};

inline std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const auto& [name, size] : sizes) text += (text.empty() ? "" : "x") + std::to_string(size);
  return text;
}

// The size of a name that the shape must have.
inline int64_t size_of(const Shape& shape, const std::string& name) {
  for (const auto& [key, size] : shape.sizes) {
    if (key == name) return size;
  }
  throw std::runtime_error("the shape " + shape_text(shape.sizes) + " has no " + name);
}

// The integers of a text, whatever stands between them.
inline std::vector<int64_t> integers(const std::string& text) {
  constexpr char kDigits[] = "0123456789";
  std::vector<int64_t> found;
  for (size_t at = text.find_first_of(kDigits); at != std::string::npos;
       at = text.find_first_of(kDigits, at)) {
    found.push_back(std::stoll(text.substr(at)));
    at = text.find_first_not_of(kDigits, at);
  }
  return found;
}

// A name in an entry of a shapes file, and what follows it up to the comma.
using Field = std::pair<std::string, std::string>;

inline std::vector<Field> fields_of(const std::string& entry) {
  std::vector<Field> fields;
  for (size_t at = entry.find('"'); at != std::string::npos; at = entry.find('"', at)) {
    const size_t quote = entry.find('"', at + 1),
                 begin = entry.find_first_not_of(": \n", quote + 1);
    if (quote == std::string::npos || begin == std::string::npos) {
      throw std::runtime_error("not a shape: " + entry);
    }
    size_t end = begin;
    int depth = 0;
    for (bool quoted = false; end < entry.size(); ++end) {
      const char c = entry[end];
      quoted ^= c == '"';
      depth += (c == '[') - (c == ']');
      if (!quoted && depth == 0 && (c == ',' || c == '}')) break;
    }
    fields.emplace_back(entry.substr(at + 1, quote - at - 1), entry.substr(begin, end - begin));
    at = end;
  }
  return fields;
}

// The sizes that an entry stands for. A list is one size after the other, and a list of lists holds
// the sizes of several names of one letter: "NK": [[4096, 4096]].
inline std::vector<Sizes> expand(const std::vector<Field>& fields) {
  std::vector<Sizes> expanded{{}};
  for (const auto& [name, value] : fields) {
    if (name == "devices" || name == "tag") continue;
    const size_t together = value.rfind("[[", 0) == 0 ? name.size() : 1;
    const std::vector<int64_t> numbers = integers(value);
    if (numbers.empty() || numbers.size() % together != 0) {
      throw std::runtime_error("not a shape: \"" + name + "\": " + value);
    }
    std::vector<Sizes> longer;
    for (const Sizes& sizes : expanded) {
      for (size_t i = 0; i < numbers.size(); i += together) {
        longer.push_back(sizes);
        for (size_t j = 0; j < together; ++j) {
          longer.back().emplace_back(together == 1 ? name : name.substr(j, 1), numbers[i + j]);
        }
      }
    }
    expanded = std::move(longer);
  }
  return expanded;
}

// Those of the device. A shape that stands in the file twice has its first tag.
inline std::vector<Shape> read_shapes(const std::string& path, bool cuda) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  std::vector<Shape> shapes;
  for (size_t at = text.find('{'); at != std::string::npos; at = text.find('{', at + 1)) {
    const auto fields = fields_of(text.substr(at, text.find('}', at) + 1 - at));
    const auto value = [&](const std::string& name) {
      for (const auto& [key, found] : fields) {
        if (key == name) return found;
      }
      return std::string();
    };
    if (value("devices").find(cuda ? "\"cuda\"" : "\"cpu\"") == std::string::npos) continue;
    const std::string quoted = value("tag");
    if (quoted.size() < 2) throw std::runtime_error("a shape without a tag in " + path);
    const std::string tag = quoted.substr(1, quoted.rfind('"') - 1);
    for (const Sizes& sizes : expand(fields)) {
      const bool is_new = std::none_of(shapes.begin(), shapes.end(),
                                       [&](const Shape& shape) { return shape.sizes == sizes; });
      if (is_new) shapes.push_back({sizes, tag});
    }
  }
  return shapes;
}

}  // namespace bench
