// The table of kernels: each EFFNETV2_KERNEL(name) at the end of a .cu file adds a row.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "half_types.hpp"

namespace host {

struct Parameter {
    size_t offset;
    size_t size;
    size_t alignment;
    bool is_pointer;
};

struct Kernel {
    std::string name;
    /// Name of its .cu file without folder and suffix.
    std::string family;
    /// One character for each parameter, see `type_code`; `{size:alignment}` for a struct passed by value.
    std::string signature;
    std::vector<Parameter> parameters;
    /// Calls the kernel as one thread of the current block.
    void (*invoke)(void** arguments);
};

/// Adds a kernel; called before main. A second kernel of the same name is remembered as an error.
void register_kernel(Kernel kernel, const char* file);

const std::vector<Kernel>& kernels();
const Kernel* find_kernel(const std::string& name);

/// Message about kernels registered twice; empty if there are none.
const std::string& registration_error();

/// p pointer; c C 8-bit, s S 16-bit, i I 32-bit, l L 64-bit integers (capitals unsigned); h f16, b bf16,
/// f float, d double.
template <class T> std::string type_code() {
    if constexpr (std::is_pointer_v<T>) {
        return "p";
    } else if constexpr (std::is_same_v<T, float>) {
        return "f";
    } else if constexpr (std::is_same_v<T, double>) {
        return "d";
    } else if constexpr (std::is_same_v<T, __half>) {
        return "h";
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return "b";
    } else if constexpr (std::is_integral_v<T> || std::is_enum_v<T>) {
        const char* codes = std::is_signed_v<T> ? "csil" : "CSIL";
        return std::string(1, codes[sizeof(T) == 1 ? 0 : sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : 3]);
    } else {
        return "{" + std::to_string(sizeof(T)) + ":" + std::to_string(alignof(T)) + "}";
    }
}

template <auto function> struct Thunk;

template <class... P, void (*function)(P...)> struct Thunk<function> {
    static void invoke(void** arguments) { call(arguments, std::index_sequence_for<P...>()); }

    static Kernel describe(const char* name) {
        Kernel kernel{name, "", "", {}, &Thunk::invoke};
        (append<std::remove_cv_t<P>>(kernel), ...);
        return kernel;
    }

  private:
    template <size_t... i> static void call(void** arguments, std::index_sequence<i...>) {
        (void)arguments;
        function(*static_cast<std::remove_reference_t<P>*>(arguments[i])...);
    }

    template <class T> static void append(Kernel& kernel) {
        static_assert(std::is_trivially_copyable_v<T>, "kernel parameters are copied bit by bit");
        size_t offset = 0;
        if (!kernel.parameters.empty())
            offset = kernel.parameters.back().offset + kernel.parameters.back().size;
        offset = (offset + alignof(T) - 1) / alignof(T) * alignof(T);
        kernel.parameters.push_back({offset, sizeof(T), alignof(T), std::is_pointer_v<T>});
        kernel.signature += type_code<T>();
    }
};

struct Registration {
    Registration(Kernel kernel, const char* file) { register_kernel(std::move(kernel), file); }
};

} // namespace host
