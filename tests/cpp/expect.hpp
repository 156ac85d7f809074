// EXPECT(condition, about): counts a failure and says which line, condition and case it was.
#pragma once

#include <cstdio>
#include <string>

inline int failures = 0;

inline void expect(bool holds, const char* condition, int line, const std::string& about) {
  if (holds) return;
  ++failures;
  std::printf("line %d: %s does not hold for %s\n", line, condition, about.c_str());
}
#define EXPECT(condition, about) expect((condition), #condition, __LINE__, about)
