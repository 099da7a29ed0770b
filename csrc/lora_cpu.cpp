// LoRA in effective space on tiles of one pair: products of factors by micro-tiles, used where they arise. Compiled
// once per instruction set, with contraction into fused multiply-adds. No standard library code here: the linker could
// pick a copy of it that needs AVX for everyone.
#include "lora.h"

#include "block_cpu.h"
#include "panel_cpu.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

static_assert(kLoraRows % kRows == 0 && kBlock % kColumns == 0, "micro-tiles fill a tile");

// Columns [column, column + columns) of a right factor: [panel][depth][kColumns].
void pack_columns(const LowRank& product, int64_t stride, int64_t column, int64_t columns, float* to) {
  pack<kColumns>(product.right + column, stride, product.depth, columns, to, [](auto x) { return x; });
}

// ---- recording

template <typename F>
ALR_HOST_DEVICE F recorded(F path_integral, F gradient, F move) {
  return path_integral - gradient * move;
}

struct RecordTarget {
  float* path_integral;
  const float* gradient;  // or null: as `product` says
  int64_t stride;
  int64_t rows;  // rows x columns of the micro-tile exist
  int64_t columns;
};

// Subtracts gradient x move of a micro-tile; product: [kRows][kColumns], the gradient unless it is dense.
template <bool kClamp>
void record_micro(const float* left, const float* right, int64_t depth, const float* product,
                  const RecordTarget& target) {
  const float* gradient = target.gradient ? target.gradient : product;
  const int64_t stride = target.gradient ? target.stride : kColumns;
  MicroTile<> moves{};
  multiply(left, right, depth, moves);
  if (target.rows == kRows && target.columns == kColumns) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        float* at = target.path_integral + i * target.stride + j * kLanes;
        const V sum = recorded(load_float(at), load_float(gradient + i * stride + j * kLanes), moves.at[i][j]);
        store_float(at, kClamp ? larger(V{}, sum) : sum);  // NaN stays
      }
    }
    return;
  }
  float move[kRows * kColumns];
  store_tile(move, kColumns, moves);
  for (int64_t i = 0; i < target.rows; ++i) {
    for (int64_t j = 0; j < target.columns; ++j) {
      float& at = target.path_integral[i * target.stride + j];
      const float sum = recorded(at, gradient[i * stride + j], move[i * kColumns + j]);
      at = kClamp && sum < 0.0f ? 0.0f : sum;
    }
  }
}

template <bool kClamp>
void record_tile(const RecordPair& p, const RecordTile& tile, float* scratch) {
  const int64_t depths[2] = {p.gradient ? 0 : p.factors.depth, p.move.depth};
  const int64_t width = padded(tile.columns, kColumns);
  float* product = scratch;  // [kRows][kColumns]
  float* lefts[2] = {product + kRows * kColumns, product + kRows * kColumns + kRows * depths[0]};
  float* rights[2] = {lefts[1] + kRows * depths[1], lefts[1] + kRows * depths[1] + width * depths[0]};
  if (!p.gradient) pack_columns(p.factors, p.columns, tile.column, tile.columns, rights[0]);
  pack_columns(p.move, p.columns, tile.column, tile.columns, rights[1]);
  for (int64_t row = tile.row; row < tile.row + tile.rows; row += kRows) {
    const int64_t rows = at_most(tile.row + tile.rows - row, kRows);
    if (!p.gradient) pack_rows(p.factors.left + row * depths[0], depths[0], rows, lefts[0]);
    pack_rows(p.move.left + row * depths[1], depths[1], rows, lefts[1]);
    for (int64_t column = 0; column < tile.columns; column += kColumns) {
      const int64_t begin = row * p.columns + tile.column + column;
      if (!p.gradient) {
        MicroTile<> sums{};
        multiply(lefts[0], rights[0] + column * depths[0], depths[0], sums);
        store_tile(product, kColumns, sums);
      }
      const RecordTarget target{p.path_integral + begin, p.gradient ? p.gradient + begin : nullptr, p.columns, rows,
                                at_most(tile.columns - column, kColumns)};
      record_micro<kClamp>(lefts[1], rights[1] + column * depths[1], depths[1], product, target);
    }
  }
}

// ---- the pull

// Two columns share a vector, so that ranks need be whole halves of vectors only: lane 2q has the first column's part
// of sum q.
constexpr int kPairs = kBlock / 2;
constexpr int kRankLanes = kLanes / 2;
// Rows of a micro-tile over the rank: the ranks in use are powers of two.
#if defined(__AVX512F__)
constexpr int kRankRows = 8;
#else
constexpr int kRankRows = 4;
#endif

ALR_HOST_DEVICE V splat_pair(const float* from) {
#if defined(__AVX512F__) || defined(__AVX2__)
  double pair;
  memcpy(&pair, from, sizeof(pair));
#endif
#if defined(__AVX512F__)
  return V(_mm512_castpd_ps(_mm512_set1_pd(pair)));
#elif defined(__AVX2__)
  return V(_mm256_castpd_ps(_mm256_set1_pd(pair)));
#else
  return V{from[0], from[1], from[0], from[1]};
#endif
}

ALR_HOST_DEVICE int64_t pair_lanes(int64_t rank) { return padded(rank, kRankLanes) * 2; }

struct PullBuffers {
  float* drift_right;  // [panels of kColumns][depth][kColumns], of lora_columns() columns
  float* down;         // [blocks][vectors of the rank][kPairs][kLanes]
  float* down_bound;
  float* drift_left;  // [panels][depth][kRows], of kLoraRows rows
  float* up;          // [panels of the rank][kLoraRows][kRankRows]
  float* up_bound;
  float* up_sums;  // [kLoraRows][pair_lanes]
  float* up_bound_sums;
  float* k;      // [kLoraRows][kBlock]
  float* force;  // [kLoraRows][kBlock]
  int64_t used;  // floats of all

  // Of null only `used` is of any use.
  PullBuffers(const PullPair& p, float* scratch) : used(0) {
    const auto take = [&](int64_t floats) {
      const int64_t begin = used;
      used += padded(floats, kLanes);
      return scratch ? scratch + begin : nullptr;
    };
    const int64_t depth = p.drift.depth, rank = p.factors.depth, columns = lora_columns(depth + rank);
    const int64_t lanes = pair_lanes(rank), rows = kLoraRows * lora_padded_rank(rank);
    drift_right = take(columns * depth);
    down = take(p.grad_up ? columns / 2 * lanes : 0);
    down_bound = take(p.curvature_up ? columns / 2 * lanes : 0);
    drift_left = take(kLoraRows * depth);
    up = take(p.grad_down ? rows : 0);
    up_bound = take(p.curvature_down ? rows : 0);
    up_sums = take(p.grad_up ? kLoraRows * lanes : 0);
    up_bound_sums = take(p.curvature_up ? kLoraRows * lanes : 0);
    k = take(kLoraRows * kBlock);
    force = take(kLoraRows * kBlock);
  }
};

// Columns [column, column + columns) of down, at most a block, as splat_pair()'s partner: [vectors][kPairs][kLanes].
// With kBound |down| times its sum over the rank.
template <bool kBound>
void pack_pairs(const float* down, int64_t stride, int64_t rank, int64_t columns, float* to) {
  float sums[kBlock] = {};
  for (int64_t q = 0; kBound && q < rank; ++q) {
    for (int64_t j = 0; j < columns; ++j) sums[j] += magnitude(down[q * stride + j]);
  }
  for (int64_t q = 0; q < padded(rank, kRankLanes); ++q) {
    float* out = to + q / kRankLanes * kPairs * kLanes + q % kRankLanes * 2;
    for (int64_t j = 0; j < kBlock; ++j) {
      const float x = q < rank && j < columns ? down[q * stride + j] : 0.0f;
      out[j / 2 * kLanes + j % 2] = kBound ? magnitude(x) * sums[j] : x;
    }
  }
}

// Some rows of up: [panels][rows][kRankRows]. With kBound as above.
template <bool kBound>
void pack_up(const float* up, int64_t rank, int64_t rows, float* to) {
  pack<kRankRows>(up, rank, rows, rank, to, [](auto x) { return kBound ? magnitude(x) : x; });
  for (int64_t t = 0; kBound && t < rows; ++t) {
    float sum = 0.0f;
    for (int64_t q = 0; q < rank; ++q) sum += magnitude(up[t * rank + q]);
    for (int64_t q = 0; q < rank; ++q) to[(q / kRankRows * rows + t) * kRankRows + q % kRankRows] *= sum;
  }
}

struct ValueSum {
  double lane[kLanes];

  ALR_HOST_DEVICE void add(V x) {
    float part[kLanes];
    store_float(part, x);
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) lane[i] += double(part[i]);
  }
};

// Of one micro-tile, rows x columns of which exist: gap = drift, k = scale Omega, force = k gap, 0 where nothing is.
// `k`: Omega in rows of kBlock; with kKeep overwritten by k.
template <bool kKeep>
void force_micro(const float* left, const float* right, int64_t depth, float scale, int64_t rows, int64_t columns,
                 float* k, float* force, ValueSum& value) {
  MicroTile<> gaps{};
  multiply(left, right, depth, gaps);
  if (rows == kRows && columns == kColumns) {
    V sum{};
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        const int at = i * int(kBlock) + j * kLanes;
        const V curve = load_float(k + at) * splat(scale), pull = curve * gaps.at[i][j];
        if (kKeep) store_float(k + at, curve);
        store_float(force + at, pull);
        sum += pull * gaps.at[i][j];
      }
    }
    value.add(sum);
    return;
  }
  store_tile(force, kBlock, gaps);
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kColumns; ++j) {
      const int64_t at = i * kBlock + j;
      const bool there = i < rows && j < columns;
      const float gap = force[at], curve = k[at] * scale, pull = curve * gap;
      k[at] = there ? curve : 0.0f;
      force[at] = there ? pull : 0.0f;
      value.lane[0] += there ? double(pull) * double(gap) : 0.0;
    }
  }
}

// sums [kRows][stride] += tile [kRows][kBlock] times kCount vectors of packed pairs.
template <int kCount>
ALR_HOST_DEVICE void add_pairs(const float* tile, const float* packed, int64_t pairs, float* sums, int64_t stride) {
  V total[kRows][kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kCount; ++j) total[i][j] = load_float(sums + i * stride + j * kLanes);
  }
  for (int64_t t = 0; t < pairs; ++t) {
    V x[kCount];
#pragma GCC unroll 2
    for (int j = 0; j < kCount; ++j) x[j] = load_float(packed + (j * kPairs + t) * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V factor = splat_pair(tile + i * kBlock + 2 * t);
#pragma GCC unroll 2
      for (int j = 0; j < kCount; ++j) total[i][j] += factor * x[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kCount; ++j) store_float(sums + i * stride + j * kLanes, total[i][j]);
  }
}

// sums [rows][lanes] += tile [rows][kBlock] times a block of packed pairs, for all rows.
void add_to_up(const float* tile, const float* packed, int64_t rows, int64_t columns, int64_t lanes, float* sums) {
  const int64_t pairs = (columns + 1) / 2;
  for (int64_t row = 0; row < rows; row += kRows) {
    const float* from = tile + row * kBlock;
    float* to = sums + row * lanes;
    int64_t lane = 0;
    for (; lane + 2 * kLanes <= lanes; lane += 2 * kLanes) {
      add_pairs<2>(from, packed + lane * kPairs, pairs, to + lane, lanes);
    }
    if (lane < lanes) add_pairs<1>(from, packed + lane * kPairs, pairs, to + lane, lanes);
  }
}

// sums [padded rank][kBlock] += packed up, transposed, times tile [rows][kBlock].
void add_to_down(const float* up, const float* tile, int64_t rows, int64_t columns, int64_t rank, float* sums) {
  for (int64_t column = 0; column < columns; column += kColumns) {
    for (int64_t q = 0; q < rank; q += kRankRows) {
      MicroTile<kRankRows> totals;
      float* at = sums + q * kBlock + column;
      load_tile(at, kBlock, totals);
      multiply<int(kBlock)>(up + q * rows, tile + column, rows, totals);
      store_tile(at, kBlock, totals);
    }
  }
}

// Adds what the lanes of pairs hold to result [rows][rank].
void add_lanes(const float* sums, int64_t rows, int64_t rank, float* result) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = sums + i * pair_lanes(rank);
    for (int64_t q = 0; q < rank; ++q) result[i * rank + q] += row[2 * q] + row[2 * q + 1];
  }
}

// Some rows and the columns of one block.
struct BlockPlace {
  int64_t row;
  int64_t rows;
  int64_t column;  // of all
  int64_t local;   // among those whose factors are packed
};

void pull_block(const PullPair& p, const BlockPlace& place, const PullBuffers& b, const DownSums& down,
                ValueSum& value) {
  const int64_t depth = p.drift.depth, rank = p.factors.depth, lanes = pair_lanes(rank), rows = place.rows;
  const int64_t columns = at_most(p.columns - place.column, kBlock);
  for (int64_t i = 0; i < rows; ++i) {
    load_block(p.importance, (place.row + i) * p.columns + place.column, int(columns), b.k + i * kBlock);
  }
  const bool keep = p.curvature_up || p.curvature_down;
  const int64_t all = padded(rows, kRows);
  for (int64_t i = rows * kBlock; i < all * kBlock; ++i) b.k[i] = 0.0f;
  for (int64_t i = 0; i < rows; i += kRows) {
    for (int64_t j = 0; j < columns; j += kColumns) {
      (keep ? force_micro<true> : force_micro<false>)(
          b.drift_left + i * depth, b.drift_right + (place.local + j) * depth, depth, p.scale, at_most(rows - i, kRows),
          at_most(columns - j, kColumns), b.k + i * kBlock + j, b.force + i * kBlock + j, value);
    }
  }
  const int64_t packed = place.local / 2 * lanes, sums = place.column * lora_padded_rank(rank);
  if (p.grad_up) add_to_up(b.force, b.down + packed, rows, columns, lanes, b.up_sums);
  if (p.curvature_up) add_to_up(b.k, b.down_bound + packed, rows, columns, lanes, b.up_bound_sums);
  if (p.grad_down) add_to_down(b.up, b.force, rows, columns, rank, down.grad + sums);
  if (p.curvature_down) add_to_down(b.up_bound, b.k, rows, columns, rank, down.curvature + sums);
}

void pack_columns_of(const PullPair& p, int64_t column, int64_t columns, const PullBuffers& b) {
  const int64_t rank = p.factors.depth, lanes = pair_lanes(rank);
  pack_columns(p.drift, p.columns, column, columns, b.drift_right);
  for (int64_t local = 0; local < columns; local += kBlock) {
    const float* down = p.factors.right + column + local;
    const int64_t count = at_most(columns - local, kBlock), to = local / 2 * lanes;
    if (p.grad_up) pack_pairs<false>(down, p.columns, rank, count, b.down + to);
    if (p.curvature_up) pack_pairs<true>(down, p.columns, rank, count, b.down_bound + to);
  }
}

void fill_zeros(float* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = 0.0f;
}

}  // namespace

int64_t lora_padded_rank(int64_t rank) { return padded(rank, kRankRows); }

int64_t lora_record_scratch(const RecordPair& p, int64_t columns) {
  const int64_t depth = (p.gradient ? 0 : p.factors.depth) + p.move.depth;
  return kRows * kColumns + (kRows + padded(columns, kColumns)) * depth;
}

void lora_record_tile(const RecordPair& p, const RecordTile& tile, bool clamp, float* scratch) {
  clamp ? record_tile<true>(p, tile, scratch) : record_tile<false>(p, tile, scratch);
}

int64_t lora_pull_scratch(const PullPair& p) { return PullBuffers(p, nullptr).used; }

double lora_pull_rows(const PullPair& p, int64_t begin, int64_t end, const DownSums& down, float* scratch) {
  const PullBuffers b(p, scratch);
  const int64_t depth = p.drift.depth, rank = p.factors.depth, step = lora_columns(depth + rank);
  const int64_t sums = kLoraRows * pair_lanes(rank), down_sums = padded(p.columns, kBlock) * lora_padded_rank(rank);
  if (p.grad_down) fill_zeros(down.grad, down_sums);
  if (p.curvature_down) fill_zeros(down.curvature, down_sums);
  ValueSum value{};
  for (int64_t column = 0; column < p.columns; column += step) {
    const int64_t columns = at_most(p.columns - column, step);
    pack_columns_of(p, column, columns, b);
    for (int64_t row = begin; row < end; row += kLoraRows) {
      const int64_t rows = at_most(end - row, kLoraRows);
      const float* up = p.factors.left + row * rank;
      pack_rows(p.drift.left + row * depth, depth, rows, b.drift_left);
      if (p.grad_down) pack_up<false>(up, rank, rows, b.up);
      if (p.curvature_down) pack_up<true>(up, rank, rows, b.up_bound);
      if (p.grad_up) fill_zeros(b.up_sums, sums);
      if (p.curvature_up) fill_zeros(b.up_bound_sums, sums);
      for (int64_t local = 0; local < columns; local += kBlock) {
        pull_block(p, BlockPlace{row, rows, column + local, local}, b, down, value);
      }
      if (p.grad_up) add_lanes(b.up_sums, rows, rank, p.grad_up + row * rank);
      if (p.curvature_up) add_lanes(b.up_bound_sums, rows, rank, p.curvature_up + row * rank);
    }
  }
  double sum = 0.0;
  for (double lane : value.lane) sum += lane;
  return sum;
}

}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
