// Reading and checking what Python hands to the module: only what memory safety needs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"

namespace py = pybind11;

namespace alr {
namespace {

inline std::string sized(const char* op, const char* name, size_t expected, size_t got) {
  return std::string(op) + ": expected " + name + " to hold " + std::to_string(expected) + " values, got " +
         std::to_string(got);
}

// One list of addresses, read straight from the Python ints.
class Pointers {
 public:
  Pointers(const char* op, const char* name, const py::list& list, size_t expected) : op_(op), name_(name) {
    if (list.size() != expected) throw std::invalid_argument(sized(op, name, expected, list.size()));
    values_.reserve(expected);
    for (size_t i = 0; i < expected; ++i) {
      void* value = PyLong_AsVoidPtr(PyList_GET_ITEM(list.ptr(), Py_ssize_t(i)));
      if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
      values_.push_back(value);
    }
  }

  size_t size() const { return values_.size(); }

  template <typename T>
  T* at(size_t i, int64_t numel) const {
    if (values_[i] == nullptr && numel > 0) {
      throw std::invalid_argument(std::string(op_) + ": expected " + name_ + "[" + std::to_string(i) +
                                  "] to be an address, got 0 for " + std::to_string(numel) + " elements");
    }
    return static_cast<T*>(values_[i]);
  }

 private:
  const char* op_;
  const char* name_;
  std::vector<void*> values_;
};

inline void check_size(const char* op, const char* name, size_t expected, size_t got) {
  if (got != expected) throw std::invalid_argument(sized(op, name, expected, got));
}

inline void check_numels(const char* op, const std::vector<int64_t>& numels) {
  for (int64_t numel : numels) {
    if (numel < 0) {
      throw std::invalid_argument(std::string(op) + ": expected numels of 0 or more, got " + std::to_string(numel));
    }
  }
}

// Global indices of the first elements; the last one's must fit as well.
inline void check_offsets(const char* op, const std::vector<int64_t>& offsets, const std::vector<int64_t>& numels,
                          bool blocks) {
  check_size(op, "offsets", numels.size(), offsets.size());
  for (size_t i = 0; i < numels.size(); ++i) {
    const int64_t last = std::numeric_limits<int64_t>::max() - numels[i];
    if (offsets[i] < 0 || offsets[i] > last) {
      throw std::invalid_argument(std::string(op) + ": expected offsets in [0, 2^63 - numel), got " +
                                  std::to_string(offsets[i]) + " for " + std::to_string(numels[i]) + " elements");
    }
    if (blocks && offsets[i] % kBlock) {
      throw std::invalid_argument(std::string(op) + ": expected offsets in multiples of " + std::to_string(kBlock) +
                                  " for moments in codes, got " + std::to_string(offsets[i]));
    }
  }
}

inline void check_codes(const char* op, const char* name, const std::vector<int>& codes, int end) {
  for (int code : codes) {
    if (code < 0 || code >= end) {
      throw std::invalid_argument(std::string(op) + ": expected " + name + " in [0, " + std::to_string(end) +
                                  "), got " + std::to_string(code));
    }
  }
}

inline void check_threads(const char* op, int num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument(std::string(op) + ": expected num_threads of 1 or more, got " +
                                std::to_string(num_threads));
  }
}

template <typename T>
T* address(const char* op, const char* name, uintptr_t value, bool needed) {
  if (value == 0 && needed) throw std::invalid_argument(std::string(op) + ": expected " + name + " to be an address, got 0");
  return reinterpret_cast<T*>(value);
}

inline void check_blocks(const char* op, const std::vector<int64_t>& numels) {
  for (int64_t numel : numels) {
    if (numel % kBlock) {
      throw std::invalid_argument(std::string(op) + ": expected multiples of " + std::to_string(kBlock) +
                                  " elements for codes, got " + std::to_string(numel));
    }
  }
}

// Importance of a list of tensors as it is kept; `optional`: an address of 0 says that it is not there.
inline std::vector<Kept> kept_list(const char* op, const char* name, const py::list& values, const py::list& scales,
                                   const std::vector<int>& formats, const std::vector<int64_t>& numels, bool optional) {
  const size_t n = numels.size();
  const std::string scales_name = std::string("scales of ") + name;
  const Pointers value(op, name, values, n), scale(op, scales_name.c_str(), scales, n);
  check_size(op, "formats", n, formats.size());
  std::vector<Kept> kept;
  for (size_t i = 0; i < n; ++i) {
    const bool codes = has_scales(formats[i]);
    check_codes(op, "formats", {codes ? 0 : formats[i]}, kDTypes);
    if (codes) check_blocks(op, {numels[i]});
    void* address = value.at<void>(i, optional ? 0 : numels[i]);
    const int64_t needed = codes && address != nullptr ? numels[i] : 0;
    kept.push_back({address, scale.at<uint16_t>(i, needed), formats[i]});
  }
  return kept;
}

}  // namespace
}  // namespace alr
