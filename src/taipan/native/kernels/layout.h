// The layout of a structure as text: its size, and name, offset and type of each field.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace taipan {

// Needs S::name and S::describe, which TAIPAN_STRUCT defines.
template <class S>
struct Layout;

// The name of a field's type, as in native/fields.py.
template <class T>
std::string type_name() {
  if constexpr (std::is_array_v<T>)
    return type_name<std::remove_extent_t<T>>() + "[" + std::to_string(std::extent_v<T>) + "]";
  else if constexpr (std::is_pointer_v<T>)
    return type_name<std::remove_cv_t<std::remove_pointer_t<T>>>() + "*";
  else if constexpr (std::is_void_v<T>)
    return "any";
  else if constexpr (std::is_integral_v<T> && std::is_unsigned_v<T>)
    return "uint" + std::to_string(8 * sizeof(T));
  else if constexpr (std::is_integral_v<T>)
    return "int" + std::to_string(8 * sizeof(T));
  else if constexpr (std::is_same_v<T, float>)
    return "float";
  else if constexpr (std::is_same_v<T, double>)
    return "double";
  else
    return Layout<T>::name;
}

template <class T>
void describe_field(std::string& out, const char* name, std::size_t offset) {
  out += std::string(" ") + name + "@" + std::to_string(offset) + ":" + type_name<T>();
}

template <class S>
void describe(std::string& out) {
  out += std::string(Layout<S>::name) + " " + std::to_string(sizeof(S));
  Layout<S>::describe(out);
  out += "\n";
}

}  // namespace taipan

// Calls TAIPAN_FIELD(S, field) for each of up to 85 fields.
#define TAIPAN_PARENTHESES ()
#define TAIPAN_AGAIN(...) TAIPAN_AGAIN_3(TAIPAN_AGAIN_3(TAIPAN_AGAIN_3(TAIPAN_AGAIN_3(__VA_ARGS__))))
#define TAIPAN_AGAIN_3(...) TAIPAN_AGAIN_2(TAIPAN_AGAIN_2(TAIPAN_AGAIN_2(TAIPAN_AGAIN_2(__VA_ARGS__))))
#define TAIPAN_AGAIN_2(...) TAIPAN_AGAIN_1(TAIPAN_AGAIN_1(TAIPAN_AGAIN_1(TAIPAN_AGAIN_1(__VA_ARGS__))))
#define TAIPAN_AGAIN_1(...) __VA_ARGS__
#define TAIPAN_EACH(S, ...) __VA_OPT__(TAIPAN_AGAIN(TAIPAN_EACH_NEXT(S, __VA_ARGS__)))
#define TAIPAN_EACH_NEXT(S, field, ...) \
  TAIPAN_FIELD(S, field) __VA_OPT__(TAIPAN_EACH_REST TAIPAN_PARENTHESES(S, __VA_ARGS__))
#define TAIPAN_EACH_REST() TAIPAN_EACH_NEXT
#define TAIPAN_FIELD(S, field) describe_field<decltype(S::field)>(out, #field, offsetof(S, field));

// All fields of S: `whole` does not compile with one more or fewer.
#define TAIPAN_STRUCT(S, ...)                                                       \
  template <>                                                                       \
  struct Layout<S> {                                                                \
    static constexpr const char* name = #S;                                         \
    static void describe(std::string& out) { TAIPAN_EACH(S, __VA_ARGS__) }          \
    static void whole(const S& all) { [[maybe_unused]] const auto& [__VA_ARGS__] = all; } \
  };
