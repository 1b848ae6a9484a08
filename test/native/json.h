// Reads the JSON files of test/fixtures. For tests alone: the product's native code parses no JSON.
// A mistake in the text or a missing key throws, which fails the test.
#pragma once

#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace turbomind::test {

class Json {
 public:
  static Json read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    TM_CHECK(file.good(), "cannot read %s", path.c_str());
    std::ostringstream text;
    text << file.rdbuf();
    return parse(text.str());
  }
  static Json parse(std::string_view text) {
    Json value = parse_value(text);
    skip_space(text);
    TM_CHECK(text.empty(), "json: text after the value");
    return value;
  }

  bool has(const std::string& key) const { return members_.count(key) != 0; }
  const Json& operator[](const std::string& key) const {
    const auto found = members_.find(key);
    TM_CHECK(found != members_.end(), "json: no key '%s'", key.c_str());
    return found->second;
  }
  const std::vector<Json>& items() const { return items_; }
  const std::string& text() const { return scalar_; }
  double number() const { return std::strtod(scalar_.c_str(), nullptr); }
  int64_t integer() const { return std::strtoll(scalar_.c_str(), nullptr, 10); }
  bool boolean() const { return scalar_ == "true"; }
  template <class T>
  std::vector<T> numbers() const {
    std::vector<T> values;
    for (const Json& item : items_) values.push_back(static_cast<T>(item.number()));
    return values;
  }

 private:
  static void skip_space(std::string_view& text) {
    while (!text.empty() && std::string_view(" \t\r\n").find(text[0]) != std::string_view::npos)
      text.remove_prefix(1);
  }
  static bool take(std::string_view& text, char wanted) {
    skip_space(text);
    if (text.empty() || text[0] != wanted) return false;
    text.remove_prefix(1);
    return true;
  }
  static std::string parse_string(std::string_view& text) {
    TM_CHECK(take(text, '"'), "json: expected a string");
    const size_t end = text.find('"');
    TM_CHECK(end != std::string_view::npos, "json: unfinished string");
    std::string value(text.substr(0, end));
    TM_CHECK(value.find('\\') == std::string::npos, "json: escapes are not needed by fixtures");
    text.remove_prefix(end + 1);
    return value;
  }
  static Json parse_value(std::string_view& text) {
    Json value;
    if (take(text, '{')) {
      if (take(text, '}')) return value;
      do {
        const std::string key = parse_string(text);
        TM_CHECK(take(text, ':'), "json: expected ':'");
        value.members_[key] = parse_value(text);
      } while (take(text, ','));
      TM_CHECK(take(text, '}'), "json: expected '}'");
      return value;
    }
    if (take(text, '[')) {
      if (take(text, ']')) return value;
      do value.items_.push_back(parse_value(text));
      while (take(text, ','));
      TM_CHECK(take(text, ']'), "json: expected ']'");
      return value;
    }
    if (!text.empty() && text[0] == '"') {
      value.scalar_ = parse_string(text);
      return value;
    }
    size_t end = 0;
    while (end < text.size() &&
           std::string_view(",]} \t\r\n").find(text[end]) == std::string_view::npos)
      ++end;
    TM_CHECK(end > 0, "json: expected a value");
    value.scalar_ = text.substr(0, end);
    text.remove_prefix(end);
    return value;
  }

  std::string scalar_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
};

}  // namespace turbomind::test
