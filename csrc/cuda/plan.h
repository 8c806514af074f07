// What the host decides before it launches anything: padding, chunk sizes, which group members lie in which tile.
// Plain C++ without CUDA, so that it is compiled and tested everywhere.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace influence_fast::cuda {

constexpr int64_t kTileRows = 128;      // rows of one thread block
constexpr int64_t kFewColumns = 16;     // queries of its tile: for few queries, reading the rows is what takes time
constexpr int64_t kManyColumns = 128;   //                      for many
constexpr int64_t kGranule = 16;        // bytes of one asynchronous copy; addresses and strides are multiples of it
constexpr int64_t kIntegerColumns = 131072;  // |row| <= 128 times |query| <= 127 stays below 2^31 over these
// Tensor cores cut their fp32 sums off where others round: a bias that grows with every step of 16 columns, some 5e-6 of
// a sum over these. Longer ones are added up in fp32.
constexpr int64_t kFloatColumns = 4096;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline int64_t tile_columns(int64_t queries) { return queries <= kFewColumns ? kFewColumns : kManyColumns; }

inline int64_t tile_count(int64_t queries) {
  const int64_t columns = tile_columns(queries);
  return (queries + columns - 1) / columns;
}

// Bytes between rows that every granule of a row of `bytes` may be copied from; never 0, so that k = 0 has addresses.
inline int64_t padded_row(int64_t bytes) { return std::max(kGranule, round_up(bytes, kGranule)); }

// Rows of one transfer of at most `budget` bytes: whole tiles, at least one tile, no more than there are.
inline int64_t chunk_rows(int64_t rows, int64_t row_bytes, int64_t budget) {
  const int64_t fit = budget / padded_row(row_bytes) / kTileRows * kTileRows;
  return std::max(kTileRows, std::min(fit, round_up(rows, kTileRows)));
}

// CSR lists of group members cut at the tiles' borders: those of group g in tile t are
// column[begin[t * (groups + 1) + g]] ... up to begin[t * (groups + 1) + g + 1], counted from the tile's first
// query, in the order in which the group names them: the order of the sum, whatever the launch.
struct TileGroups {
  std::vector<int32_t> begin;   // [tiles, groups + 1]
  std::vector<int32_t> column;  // [members]
};

inline TileGroups tile_groups(int64_t groups, const int64_t* begin, const int64_t* query, int64_t queries) {
  const int64_t columns = tile_columns(queries), tiles = tile_count(queries);
  std::vector<int32_t> filled(static_cast<size_t>(tiles * groups + 1), 0);  // [tile, group] first counts, then places
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t m = begin[g]; m < begin[g + 1]; ++m) ++filled[static_cast<size_t>(query[m] / columns * groups + g)];
  TileGroups lists;
  lists.begin.resize(static_cast<size_t>(tiles * (groups + 1)));
  int32_t place = 0;
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t g = 0; g <= groups; ++g) {
      lists.begin[static_cast<size_t>(t * (groups + 1) + g)] = place;
      if (g == groups) break;
      int32_t& cell = filled[static_cast<size_t>(t * groups + g)];
      const int32_t members = cell;
      cell = place;
      place += members;
    }
  lists.column.resize(static_cast<size_t>(place));
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t m = begin[g]; m < begin[g + 1]; ++m) {
      int32_t& next = filled[static_cast<size_t>(query[m] / columns * groups + g)];
      lists.column[static_cast<size_t>(next++)] = static_cast<int32_t>(query[m] % columns);
    }
  return lists;
}

}  // namespace influence_fast::cuda
