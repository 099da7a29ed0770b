// The part of alr_kernels._C for LoRA in effective space; checks only what memory safety needs.
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "lora.h"

namespace alr {
namespace {

// Addresses of left and of right factors, and the dimension that both have.
using LowRankArguments = std::tuple<py::list, py::list, std::vector<int64_t>>;

class LowRanks {
 public:
  LowRanks(const char* op, const char* name, const LowRankArguments& arguments, size_t n)
      : left_(op, name, std::get<0>(arguments), n),
        right_(op, name, std::get<1>(arguments), n),
        depths_(std::get<2>(arguments)) {
    check_size(op, name, n, depths_.size());
    for (int64_t depth : depths_) {
      if (depth < 0) {
        throw std::invalid_argument(std::string(op) + ": expected depths of " + name + " of 0 or more, got " +
                                    std::to_string(depth));
      }
    }
  }

  // `some`: whether there are rows and columns.
  LowRank at(size_t i, bool some) const {
    const int64_t needed = some ? depths_[i] : 0;
    return {left_.at<float>(i, needed), right_.at<float>(i, needed), depths_[i]};
  }

 private:
  Pointers left_;
  Pointers right_;
  std::vector<int64_t> depths_;
};

// Elements of each pair, rows times columns.
std::vector<int64_t> numels_of(const char* op, const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
  check_size(op, "columns", rows.size(), columns.size());
  check_numels(op, rows);
  check_numels(op, columns);
  std::vector<int64_t> numels;
  for (size_t i = 0; i < rows.size(); ++i) {
    int64_t numel = 0;
    if (__builtin_mul_overflow(rows[i], columns[i], &numel)) {
      throw std::invalid_argument(std::string(op) + ": expected fewer than 2^63 elements, got " +
                                  std::to_string(rows[i]) + " x " + std::to_string(columns[i]));
    }
    numels.push_back(numel);
  }
  return numels;
}

// An address in `gradients` says that the gradient is dense; 0, that `factors` have it.
void lora_record(const py::list& path_integrals, const py::list& gradients, const LowRankArguments& factors,
                 const LowRankArguments& moves, const std::vector<int64_t>& rows, const std::vector<int64_t>& columns,
                 bool clamp, int num_threads) {
  const char* op = "lora_record_";
  const size_t n = rows.size();
  const std::vector<int64_t> numels = numels_of(op, rows, columns);
  const Pointers path_integral(op, "path_integrals", path_integrals, n), gradient(op, "gradients", gradients, n);
  const LowRanks factor(op, "factors", factors, n), move(op, "moves", moves, n);
  check_threads(op, num_threads);
  std::vector<RecordPair> pairs;
  for (size_t i = 0; i < n; ++i) {
    const float* dense = gradient.at<float>(i, 0);
    pairs.push_back({path_integral.at<float>(i, numels[i]), dense, factor.at(i, numels[i] && !dense),
                     move.at(i, numels[i]), rows[i], columns[i]});
  }
  const py::gil_scoped_release release;
  lora_record_cpu(pairs, clamp, num_threads);
}

using KeptArguments = std::tuple<py::list, py::list, std::vector<int>>;
// Values, then gradients and curvatures of up and down; an empty list of these where they are not wanted.
using PullResults = std::tuple<py::list, py::list, py::list, py::list, py::list>;

void lora_pull(const KeptArguments& importances, const std::vector<double>& scales, const LowRankArguments& drifts,
               const LowRankArguments& factors, const std::vector<int64_t>& rows, const std::vector<int64_t>& columns,
               const PullResults& results, int num_threads) {
  const char* op = "lora_pull";
  const size_t n = rows.size();
  const std::vector<int64_t> numels = numels_of(op, rows, columns);
  const auto kept = kept_list(op, "importances", std::get<0>(importances), std::get<1>(importances),
                              std::get<2>(importances), numels, false);
  check_size(op, "scales", n, scales.size());
  const LowRanks drift(op, "drifts", drifts, n), factor(op, "factors", factors, n);
  const auto wanted = [&](const char* name, const py::list& list) {
    return Pointers(op, name, list, list.size() ? n : 0);
  };
  const Pointers value(op, "values", std::get<0>(results), n);
  const Pointers grad_up = wanted("grad_ups", std::get<1>(results));
  const Pointers grad_down = wanted("grad_downs", std::get<2>(results));
  const Pointers curvature_up = wanted("curvature_ups", std::get<3>(results));
  const Pointers curvature_down = wanted("curvature_downs", std::get<4>(results));
  check_threads(op, num_threads);
  std::vector<PullPair> pairs;
  for (size_t i = 0; i < n; ++i) {
    if (has_scales(kept[i].format)) check_blocks(op, {columns[i]});
    const LowRank f = factor.at(i, numels[i]);
    const int64_t needed = numels[i] ? f.depth : 0;
    const auto at = [&](const Pointers& list) { return list.size() ? list.at<float>(i, needed) : nullptr; };
    pairs.push_back({kept[i], float(scales[i]), drift.at(i, numels[i]), f, rows[i], columns[i], value.at<double>(i, 1),
                     at(grad_up), at(grad_down), at(curvature_up), at(curvature_down)});
  }
  const py::gil_scoped_release release;
  lora_pull_cpu(pairs, num_threads);
}

}  // namespace

void bind_lora(py::module_& m) {
  using namespace py::literals;
  m.def("lora_record_", &lora_record, "path_integrals"_a, "gradients"_a, "factors"_a, "moves"_a, "rows"_a, "columns"_a,
        "clamp"_a, "num_threads"_a);
  m.def("lora_pull", &lora_pull, "importances"_a, "scales"_a, "drifts"_a, "factors"_a, "rows"_a, "columns"_a,
        "results"_a, "num_threads"_a);
}

}  // namespace alr
