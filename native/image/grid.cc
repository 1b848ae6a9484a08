// Which tile grid an image gets: InternVL's `dynamic_preprocess`, ties included. Pure functions, any
// thread.
//
// The original collects candidate grids in a Python set, sorts them by their number of tiles (a
// stable sort) and scans for the nearest aspect ratio. Among grids with equally many tiles the scan
// order is therefore the iteration order of a CPython set. With min_tiles = 1 that order never
// decides (no two grids of equal product tie with nothing nearer), but with min_tiles > 1 it does:
// with min 4 and max 4, aspect 2.5 lies 1.5 from both 4:1 and 2:2. Models were trained with what
// CPython did, so the set is rebuilt here: tuple hash, probing and growth of 64-bit CPython since
// 3.8, all of them deterministic.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "image/preprocess.h"

namespace turbomind::image {
namespace {

// hash((a, b)) for small non-negative integers, whose own hash is their value.
uint64_t tuple_hash(const TileGrid& grid) {
  constexpr uint64_t kPrime1 = 11400714785074694791ULL;
  constexpr uint64_t kPrime2 = 14029467366897019727ULL;
  constexpr uint64_t kPrime5 = 2870177450012600261ULL;
  uint64_t hash = kPrime5;
  for (const int item : {grid.columns, grid.rows}) {
    hash += static_cast<uint64_t>(item) * kPrime2;
    hash = (hash << 31) | (hash >> 33);
    hash *= kPrime1;
  }
  hash += 2 ^ (kPrime5 ^ 3527539ULL);
  return hash == ~0ULL ? 1546275796ULL : hash;
}

// Insertion into a set of distinct keys; nothing is ever looked up or removed.
class PythonSet {
 public:
  void add(const TileGrid& grid) {
    insert(grid);
    ++used_;
    if (used_ * 5 >= (slots_.size() - 1) * 3) grow();
  }
  std::vector<TileGrid> in_iteration_order() const {
    std::vector<TileGrid> out;
    for (const TileGrid& slot : slots_) {
      if (slot.columns != 0) out.push_back(slot);
    }
    return out;
  }

 private:
  void insert(const TileGrid& grid) {
    constexpr size_t kLinearProbes = 9;
    const uint64_t hash = tuple_hash(grid);
    const size_t mask = slots_.size() - 1;
    uint64_t perturb = hash;
    size_t i = hash & mask;
    while (true) {
      const size_t last = i + kLinearProbes <= mask ? i + kLinearProbes : i;
      for (size_t slot = i; slot <= last; ++slot) {
        if (slots_[slot].columns != 0) continue;
        slots_[slot] = grid;
        return;
      }
      perturb >>= 5;
      i = (i * 5 + 1 + perturb) & mask;
    }
  }
  void grow() {
    const size_t wanted = used_ > 50000 ? used_ * 2 : used_ * 4;
    size_t size = 8;
    while (size <= wanted) size *= 2;
    const std::vector<TileGrid> old = std::exchange(slots_, std::vector<TileGrid>(size, kEmpty));
    for (const TileGrid& slot : old) {
      if (slot.columns != 0) insert(slot);
    }
  }

  static constexpr TileGrid kEmpty{0, 0};
  std::vector<TileGrid> slots_ = std::vector<TileGrid>(8, kEmpty);
  size_t used_ = 0;
};

}  // namespace

std::vector<TileGrid> candidate_grids(int min_tiles, int max_tiles) {
  // The original's three nested loops, each pair visited only the first time it appears: at
  // n = max(columns, rows), or at n = min_tiles for all that are smaller.
  PythonSet set;
  for (int n = min_tiles; n <= max_tiles; ++n) {
    for (int columns = 1; columns <= n; ++columns) {
      const int first_row = n == min_tiles || columns == n ? 1 : n;
      for (int rows = first_row; rows <= n && columns * rows <= max_tiles; ++rows) {
        if (columns * rows >= min_tiles) set.add({columns, rows});
      }
    }
  }
  std::vector<TileGrid> grids = set.in_iteration_order();
  std::stable_sort(grids.begin(), grids.end(), [](const TileGrid& a, const TileGrid& b) {
    return a.columns * a.rows < b.columns * b.rows;
  });
  return grids;
}

TileGrid choose_grid(int width, int height, const TileOptions& options) {
  check_size(width, height);
  check_options(options);
  const double aspect = static_cast<double>(width) / height;
  const double area = static_cast<double>(width) * height;
  const double tile_area = static_cast<double>(options.tile_size) * options.tile_size;
  double best_difference = std::numeric_limits<double>::infinity();
  TileGrid best;
  for (const TileGrid& grid : candidate_grids(options.min_tiles, options.max_tiles)) {
    const double difference = std::abs(aspect - static_cast<double>(grid.columns) / grid.rows);
    // An equally good grid replaces a smaller one only if the image fills over half of it.
    const bool fills = area > 0.5 * tile_area * grid.columns * grid.rows;
    if (difference < best_difference || (difference == best_difference && fills)) {
      best_difference = difference;
      best = grid;
    }
  }
  return best;
}

}  // namespace turbomind::image
