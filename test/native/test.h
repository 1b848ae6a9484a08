// A test harness in one header: TEST("sentence") { EXPECT(…); }. Prints each failure with its place
// and values; exits 1 if any failed, 77 if the whole file was skipped. Chosen over a library because
// a fresh clone has no C++ package manager to fetch one with.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "base/error.h"

namespace turbomind::test {

struct Case {
  const char* name;
  std::function<void()> body;
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
struct Register {
  Register(const char* name, std::function<void()> body) {
    cases().push_back({name, std::move(body)});
  }
};

template <class T>
std::string show(const T& value) {
  std::ostringstream out;
  if constexpr (requires { out << value; }) {
    out << value;
  } else {
    out << "<value>";
  }
  return out.str();
}

inline void report(bool ok, const char* expression, const char* file, int line,
                   const std::string& detail) {
  if (ok) return;
  ++failures();
  std::printf("    FAIL %s:%d  %s  %s\n", file, line, expression, detail.c_str());
}

inline int run_all() {
  int failed_cases = 0;
  for (const Case& test : cases()) {
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      report(false, "no exception expected", test.name, 0, error.what());
    }
    const bool ok = failures() == before;
    if (!ok) ++failed_cases;
    std::printf("%s %s\n", ok ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
  }
  std::printf("%zu cases, %d failed\n", cases().size(), failed_cases);
  return failed_cases == 0 ? 0 : 1;
}

[[noreturn]] inline void skip_all(const char* reason) {
  std::printf("SKIP: %s\n", reason);
  std::exit(77);
}

}  // namespace turbomind::test

#define TM_CONCAT2(a, b) a##b
#define TM_CONCAT(a, b) TM_CONCAT2(a, b)
#define TEST(name)                                                              \
  static void TM_CONCAT(test_body_, __LINE__)();                                \
  static const ::turbomind::test::Register TM_CONCAT(test_register_, __LINE__)( \
      name, &TM_CONCAT(test_body_, __LINE__));                                  \
  static void TM_CONCAT(test_body_, __LINE__)()

#define EXPECT(condition) \
  ::turbomind::test::report(static_cast<bool>(condition), #condition, __FILE__, __LINE__, "")
#define EXPECT_EQ(a, b)                                                                            \
  do {                                                                                             \
    const auto& va = (a);                                                                          \
    const auto& vb = (b);                                                                          \
    ::turbomind::test::report(va == vb, #a " == " #b, __FILE__, __LINE__,                          \
                              ::turbomind::test::show(va) + " vs " + ::turbomind::test::show(vb)); \
  } while (false)
#define EXPECT_NEAR(a, b, tolerance)                                                               \
  do {                                                                                             \
    const double va = (a);                                                                         \
    const double vb = (b);                                                                         \
    ::turbomind::test::report(std::abs(va - vb) <= (tolerance), #a " ~ " #b, __FILE__, __LINE__,   \
                              ::turbomind::test::show(va) + " vs " + ::turbomind::test::show(vb)); \
  } while (false)
#define EXPECT_ERROR(expression, wanted)                                                           \
  do {                                                                                             \
    bool thrown = false;                                                                           \
    try {                                                                                          \
      (void)(expression);                                                                          \
    } catch (const ::turbomind::Error& error) {                                                    \
      thrown = true;                                                                               \
      ::turbomind::test::report(error.code() == (wanted), #expression " fails with " #wanted,      \
                                __FILE__, __LINE__, error.what());                                 \
    }                                                                                              \
    ::turbomind::test::report(thrown, #expression " throws", __FILE__, __LINE__, "did not throw"); \
  } while (false)
#define TEST_MAIN() \
  int main() { return ::turbomind::test::run_all(); }
