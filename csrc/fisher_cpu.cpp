// fisher_linear_ on one tile: a matrix product per sample, squared and added before the next. Compiled once per
// instruction set, with contraction into fused multiply-adds. No standard library code here: the linker could pick a
// copy of it that needs AVX for everyone.
#include "fisher.h"
#include "panel_cpu.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

// Tokens packed at a time: a panel of kColumns (16 KB with AVX-512) and one of kRows share the L1 cache.
constexpr int64_t kDepth = 128;

// Gradient of the tokens so far of one micro-tile; read unless `first`, kept unless `last`.
struct Part {
  float* kept;  // [kRows][kColumns]
  bool first;
  bool last;
};

// Where the micro-tile's elements go: rows x columns of them exist.
struct Target {
  float* importance;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  float scale;
};

template <Term kTerm>
void micro(const float* deltas, const float* inputs, int64_t tokens, const Part& part, const Target& target) {
  MicroTile<> sums;
  if (part.first) {
    sums = {};
  } else {
    load_tile(part.kept, kColumns, sums);
  }
  multiply(deltas, inputs, tokens, sums);
  const bool whole = target.rows == kRows && target.columns == kColumns;
  if (part.last && whole) {
    const V scale = splat(target.scale);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        float* at = target.importance + i * target.stride + j * kLanes;
        store_float(at, load_float(at) + scale * raised(sums.at[i][j], kTerm));
      }
    }
    return;
  }
  store_tile(part.kept, kColumns, sums);
  if (!part.last) return;
  for (int64_t i = 0; i < target.rows; ++i) {
    for (int64_t j = 0; j < target.columns; ++j) {
      target.importance[i * target.stride + j] += target.scale * raised(part.kept[i * kColumns + j], kTerm);
    }
  }
}

struct Buffers {
  float* deltas;  // [row panels][kDepth][kRows]
  float* inputs;  // [column panels][kDepth][kColumns]
  float* kept;    // [column panels][row panels][kRows][kColumns]
};

template <Term kProduct>
void add_product(const FisherTensor& t, const FisherTile& tile, const Buffers& b, int64_t depth, bool first,
                 bool last) {
  float* kept = b.kept;
  for (int64_t column = 0; column < tile.columns; column += kColumns) {
    const float* inputs = b.inputs + column * depth;
    for (int64_t row = 0; row < tile.rows; row += kRows, kept += kRows * kColumns) {
      const int64_t rows = tile.rows - row, columns = tile.columns - column;
      const Target target{t.importance + (tile.row + row) * t.columns + tile.column + column, t.columns,
                          rows < kRows ? rows : kRows, columns < kColumns ? columns : kColumns, t.scale};
      micro<kProduct>(b.deltas + row * depth, inputs, depth, Part{kept, first, last}, target);
    }
  }
}

template <typename T, Term kOperand, Term kProduct>
void tile_loop(const FisherTensor& t, const FisherPlan& plan, const FisherTile& tile, const Buffers& b) {
  for (int64_t n = 0; n < plan.samples; ++n) {
    const T* deltas = static_cast<const T*>(t.deltas) + n * plan.tokens * t.rows + tile.row;
    const T* inputs = static_cast<const T*>(t.inputs) + n * plan.tokens * t.columns + tile.column;
    for (int64_t token = 0; token < plan.tokens; token += kDepth) {
      const int64_t left = plan.tokens - token, depth = left < kDepth ? left : kDepth;
      const auto operand = [](auto x) { return raised(x, kOperand); };
      pack<kRows>(deltas + token * t.rows, t.rows, depth, tile.rows, b.deltas, operand);
      pack<kColumns>(inputs + token * t.columns, t.columns, depth, tile.columns, b.inputs, operand);
      add_product<kProduct>(t, tile, b, depth, token == 0, left <= kDepth);
    }
  }
}

template <typename T>
void tile_of(const FisherTensor& t, const FisherPlan& plan, const FisherTile& tile, const Buffers& b) {
  if (plan.operand == kSquare) return tile_loop<T, kSquare, kIdentity>(t, plan, tile, b);
  if (plan.operand == kMagnitude) return tile_loop<T, kMagnitude, kIdentity>(t, plan, tile, b);
  if (plan.product == kSquare) return tile_loop<T, kIdentity, kSquare>(t, plan, tile, b);
  return tile_loop<T, kIdentity, kMagnitude>(t, plan, tile, b);
}

}  // namespace

int64_t fisher_row_step() { return kRows; }

int64_t fisher_scratch(int64_t rows, int64_t columns) {
  const int64_t padded_rows = padded(rows, kRows), padded_columns = padded(columns, kColumns);
  return (padded_rows + padded_columns) * kDepth + padded_rows * padded_columns;
}

void fisher_linear_tile(const FisherTensor& t, const FisherPlan& plan, const FisherTile& tile, float* scratch) {
  const int64_t padded_rows = padded(tile.rows, kRows);
  const int64_t padded_columns = padded(tile.columns, kColumns);
  const Buffers b{scratch, scratch + padded_rows * kDepth, scratch + (padded_rows + padded_columns) * kDepth};
  switch (t.dtype) {
    case kFloat32: return tile_of<float>(t, plan, tile, b);
    case kBFloat16: return tile_of<BFloat16>(t, plan, tile, b);
    default: return tile_of<Float16>(t, plan, tile, b);
  }
}

}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
