// A digest of what lies in pieces of memory, read once at the speed of memory: whether copies of it are still right.
//
// A step maps digests to digests one to one for a given word, and words to digests for a given digest: one changed word
// always changes the digest, several leave it as it was by a chance of 2^-64. The rotation brings upper bits (signs, say)
// to where the next product spreads them.
#include <algorithm>

#include "simd.h"

namespace taipan {
namespace {

constexpr int kChains = 8;                // that do not wait for each other
constexpr Index kBlock = Index(1) << 20;  // bytes that a thread takes at once

struct Piece {
  const unsigned char* address;
  Index bytes;
};

struct Block {
  Piece piece;
  std::uint64_t digest;
};

inline std::uint64_t step(std::uint64_t digest, std::uint64_t word) {
  const std::uint64_t product = (digest ^ word) * 0x9e3779b97f4a7c15u;
  return product << 29 | product >> 35;
}

std::uint64_t digest_of(const Piece& piece) {
  std::uint64_t chain[kChains], words[kChains];
  for (int n = 0; n < kChains; ++n) chain[n] = n;
  Index at = 0;
  for (; at + Index(sizeof words) <= piece.bytes; at += sizeof words) {
    std::memcpy(words, piece.address + at, sizeof words);
    for (int n = 0; n < kChains; ++n) chain[n] = step(chain[n], words[n]);
  }
  std::memset(words, 0, sizeof words);
  std::memcpy(words, piece.address + at, piece.bytes - at);
  std::uint64_t digest = piece.bytes;
  for (int n = 0; n < kChains; ++n) digest = step(digest, step(chain[n], words[n]));
  return digest;
}

}  // namespace
}  // namespace taipan

// Of `count` pieces, addresses and bytes by turns; the digest does not depend on the threads.
extern "C" int taipan_digest(const std::ptrdiff_t* pieces, std::ptrdiff_t count, std::int64_t* result, int threads) {
  using namespace taipan;
  Index blocks = 0;
  for (Index n = 0; n < count; ++n) blocks += (pieces[2 * n + 1] + kBlock - 1) / kBlock;
  Scratch& scratch = thread_scratch();
  if (!scratch.reserve(Scratch::bytes<Block>(blocks))) return kNoMemory;
  Block* block = scratch.take<Block>(blocks);
  Index next = 0;
  for (Index n = 0; n < count; ++n) {
    const auto* address = reinterpret_cast<const unsigned char*>(pieces[2 * n]);
    const Index bytes = pieces[2 * n + 1];
    for (Index at = 0; at < bytes; at += kBlock) block[next++] = {{address + at, std::min(kBlock, bytes - at)}, 0};
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (blocks > 1)
  for (Index n = 0; n < blocks; ++n) block[n].digest = digest_of(block[n].piece);
  std::uint64_t digest = count;
  for (Index n = 0; n < blocks; ++n) digest = step(digest, block[n].digest);
  std::memcpy(result, &digest, sizeof digest);
  return kOk;
}
