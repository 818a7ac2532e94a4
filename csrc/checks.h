// Argument checks. An error names the argument, what was received and what is supported, before anything is written.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace quest {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    message << "quest_ops: ";
    ((message << parts), ...);
    throw std::runtime_error(message.str());
}

#define QUEST_CHECK(condition, ...) \
    if (!(condition)) quest::fail(__VA_ARGS__)

inline const char* name_of(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return "float32";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Double: return "float64";
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Byte: return "uint8";
        case ScalarType::Short: return "int16";
        case ScalarType::Char: return "int8";
        case ScalarType::Bool: return "bool";
        case ScalarType::ComplexFloat: return "complex64";
        case ScalarType::ComplexDouble: return "complex128";
        case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
        case ScalarType::Float8_e5m2: return "float8_e5m2";
        default: return "another dtype";
    }
}

template <class List>
std::string join(const List& values) {
    std::ostringstream text;
    const char* separator = "";
    for (auto value : values) {
        text << separator << value;
        separator = ", ";
    }
    return text.str();
}

// A tensor argument under its name, with sizes and strides read once.
struct Arg {
    const char* name;
    Tensor tensor;
    int64_t rank;
    int64_t sizes[5] = {}, strides[5] = {};
    ScalarType dtype;

    Arg(const char* name, const Tensor& t, std::initializer_list<int64_t> ranks, const char* shape)
        : name(name), tensor(t) {
        if (!t.defined()) fail(name, " must be a tensor ", shape, ", got None");
        rank = t.dim();
        dtype = t.scalar_type();
        if (!t.is_cuda() && !t.is_cpu()) fail(name, " must be on the CPU or a CUDA device, got ", device_text());
        bool known = false;
        for (int64_t r : ranks) known |= r == rank;
        if (!known) fail(name, " must have shape ", shape, ", got ", shape_text());
        for (int64_t i = 0; i < rank; ++i) {
            sizes[i] = t.size(i);
            strides[i] = t.stride(i);
        }
    }

    std::string shape_text() const {
        std::string text = "[";
        for (int64_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
        return text + "]";
    }

    void expect_size(int64_t dim, int64_t expected, const char* meaning) const {
        if (sizes[dim] != expected)
            fail(name, " has size ", sizes[dim], " in dimension ", dim, " (shape ", shape_text(), "), but ", meaning,
                 " is ", expected);
    }

    void expect_dtype(ScalarType expected, const char* why = "") const {
        if (dtype != expected) fail(name, " must be ", name_of(expected), why, ", got ", name_of(dtype));
    }

    void expect_device_of(const Arg& other) const {
        if (tensor.is_cuda() != other.tensor.is_cuda() || tensor.get_device_index() != other.tensor.get_device_index())
            fail(name, " is on ", device_text(), ", but ", other.name, " is on ", other.device_text());
    }

    std::string device_text() const {
        if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
        return tensor.is_cpu() ? "cpu" : "another kind of device";
    }

    // Last dimension contiguous, rows aligned; strides of size-1 dimensions mean nothing.
    void expect_aligned_rows(int64_t alignment = 16) const {
        if (tensor.numel() == 0) return;
        if (sizes[rank - 1] > 1 && strides[rank - 1] != 1)
            fail(name, " must be contiguous in its last dimension, got stride ", strides[rank - 1]);
        const int64_t bytes = static_cast<int64_t>(tensor.element_size());
        for (int64_t i = 0; i + 1 < rank; ++i)
            if (sizes[i] > 1 && strides[i] * bytes % alignment != 0)
                fail(name, " must have rows aligned to ", alignment, " bytes, got stride ", strides[i], " (", bytes,
                     "-byte elements) in dimension ", i);
        if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment != 0)
            fail(name, " must start at an address aligned to ", alignment,
                 " bytes; a slice or an odd storage offset moved it");
    }

    // A tensor that is written must not map two elements to one address.
    void expect_no_overlap() const {
        for (int64_t i = 0; i < rank; ++i)
            if (sizes[i] > 1 && strides[i] == 0) fail(name, " is written, but is expanded (stride 0) in dimension ", i);
    }

    void expect_contiguous() const {
        if (!tensor.is_contiguous()) fail(name, " must be contiguous, got strides [", join(tensor.strides()), "]");
    }

    // Kernels multiply by strides of 32 bits, in bytes.
    void expect_narrow_strides() const {
        const int64_t bytes = static_cast<int64_t>(tensor.element_size());
        for (int64_t i = 0; i < rank; ++i)
            if (stride_of(i) < 0 || stride_of(i) * bytes > UINT32_MAX)
                fail(name, " has stride ", strides[i], " in dimension ", i, "; supported: below 4 GiB");
    }

    int64_t stride_of(int64_t dim) const { return sizes[dim] > 1 ? strides[dim] : 0; }
    void* data() const { return tensor.data_ptr(); }
    template <class T>
    T* data_as() const {
        return static_cast<T*>(tensor.data_ptr());
    }
};

inline int32_t narrow(const char* name, int64_t value) {
    if (value < 0 || value > INT32_MAX) fail(name, " must lie in 0..2147483647, got ", value);
    return static_cast<int32_t>(value);
}

inline void expect_one_of(const char* name, int64_t value, std::initializer_list<int64_t> supported) {
    for (int64_t s : supported)
        if (s == value) return;
    fail(name, " ", value, " is not supported; supported: ", join(supported));
}

inline void expect_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) fail(name, " must lie in ", low, "..", high, ", got ", value);
}

}  // namespace quest
