// Tile registers (AMX) for products of bfloat16 with sums in fp32. TAIPAN_TILES says that the library is compiled for
// them; at run time it asks the system for permission.
#pragma once

#include "narrow.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define TAIPAN_TILES

#include <sys/syscall.h>
#include <unistd.h>

namespace taipan {

// Linux gives tiles only to a process that asks. Asking again, as other libraries do, is harmless.
inline bool tiles_granted() {
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

// The intrinsics do not tell the compiler what memory they read.
inline void written_memory() { asm volatile("" ::: "memory"); }

// Eight tiles of 16 rows of 64 bytes, for the lifetime of this object, in this thread.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    static_assert(sizeof shape == 64);
    asm volatile("" ::"r"(&shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// Sums of (16 R, 16 W) in tiles 0 to 3; 4 to 7 take the operands. The numbers of tiles are part of the instructions.
template <int R, int W>
struct TileBlock {
  void clear() {
    _tile_zero(0);
    if constexpr (R == 2) _tile_zero(1);
    if constexpr (W == 2) _tile_zero(2);
    if constexpr (R == 2 && W == 2) _tile_zero(3);
  }

  void load(const float* c, Index c_row) {
    written_memory();
    _tile_loadd(0, c, 4 * c_row);
    if constexpr (R == 2) _tile_loadd(1, c + 16 * c_row, 4 * c_row);
    if constexpr (W == 2) _tile_loadd(2, c + 16, 4 * c_row);
    if constexpr (R == 2 && W == 2) _tile_loadd(3, c + 16 * c_row + 16, 4 * c_row);
  }

  void store(float* c, Index c_row) {
    _tile_stored(0, c, 4 * c_row);
    if constexpr (R == 2) _tile_stored(1, c + 16 * c_row, 4 * c_row);
    if constexpr (W == 2) _tile_stored(2, c + 16, 4 * c_row);
    if constexpr (R == 2 && W == 2) _tile_stored(3, c + 16 * c_row + 16, 4 * c_row);
    written_memory();
  }

  // += a b over a number of blocks of 32 terms; packed as in products.h.
  void multiply(Index blocks, const Bfloat16* a, Index a_row, const Bfloat16* b, Index b_pair) {
    written_memory();
    for (Index k = 0; k < blocks; ++k) {
      _tile_loadd(4, a, 2 * a_row);
      _tile_loadd(6, b, 2 * b_pair);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (R == 2) {
        _tile_loadd(5, a + 16 * a_row, 2 * a_row);
        _tile_dpbf16ps(1, 5, 6);
      }
      if constexpr (W == 2) {
        _tile_loadd(7, b + 32, 2 * b_pair);
        _tile_dpbf16ps(2, 4, 7);
      }
      if constexpr (R == 2 && W == 2) _tile_dpbf16ps(3, 5, 7);
      a += 32;
      b += 16 * b_pair;
    }
  }
};

}  // namespace taipan
#endif
