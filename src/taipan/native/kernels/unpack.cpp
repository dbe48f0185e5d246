// The weights of a matrix of int4, as its products with many vectors at once read them.
#include "int4.h"

namespace taipan {
namespace {

// The levels of a group of a tile, row after row.
void levels_of(const std::uint8_t* bytes, std::int8_t (&to)[kTile][kGroup]) {
  for (Index b = 0; b < kGroup / kBlockColumns; ++b) {
    std::int8_t half[2][kBlock];
    for (Index i = 0; i < kBlock; ++i) {
      half[0][i] = kLevels[bytes[b * kBlock + i] & 15];
      half[1][i] = kLevels[bytes[b * kBlock + i] >> 4];
    }
    for (Index r = 0; r < kTile; ++r)
      for (Index h = 0; h < 2; ++h) std::memcpy(to[r] + b * kBlockColumns + 4 * h, half[h] + 4 * r, 4);
  }
}

template <class W>
void unpack_tile(const Tiles& tiles, Index tile, Index rows, W* out) {
  alignas(64) std::int8_t levels[kTile][kGroup];
  for (Index g = 0; g < tiles.groups; ++g) {
    levels_of(tiles.bytes(tile, g), levels);
    const Index columns = tiles.columns_of(g);
    for (Index r = 0; r < rows; ++r) {
      const Real scale = widen_one<Real>(tiles.scales(tile, g)[r]);
      W* to = out + (tile * kTile + r) * tiles.columns + g * kGroup;
      Index k = 0;
      for (; k + kLanes<Real> <= columns; k += kLanes<Real>) {
        const Vector<Real> weight = widen<Real>(&levels[r][k]) * scale;
        narrow(to + k, weight);
      }
      for (; k < columns; ++k) to[k] = narrow_one<W>(static_cast<Real>(levels[r][k]) * scale);
    }
  }
}

}  // namespace
}  // namespace taipan

TAIPAN_FUNCTION(unpack, Unpack) {
  using namespace taipan;
  const Matrix& m = call->matrix;
  if (m.rows < 0 || m.columns < 0 || m.weight == nullptr || m.scale == nullptr || call->out == nullptr) return kUnsupported;
  const Tiles tiles(m);
  const Index count = (m.rows + kTile - 1) / kTile;
  return with_element<Real>(call->narrow, [&]<class W>() {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 1)
    for (Index tile = 0; tile < count; ++tile)
      unpack_tile(tiles, tile, std::min(kTile, m.rows - tile * kTile), static_cast<W*>(call->out));
    return static_cast<int>(kOk);
  });
}
