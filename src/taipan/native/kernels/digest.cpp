// A digest of pieces of memory, computed at the speed of memory: tells whether copies of them are still current.
//
// For a given word, a step maps digests to digests one to one; for a given digest, it maps words to digests one to one. So
// one changed word always changes the digest; several changed words keep it with a chance of 2^-64. The rotation moves
// upper bits (such as signs) to where the next product spreads them.
#include <algorithm>

#include "interface.h"

namespace taipan {
namespace {

constexpr int kChains = 8;                // independent
constexpr Index kBlock = Index(1) << 20;  // bytes that a thread takes at once

struct Block {
  Piece piece;
  std::uint64_t digest;
};

inline std::uint64_t step(std::uint64_t digest, std::uint64_t word) {
  const std::uint64_t product = (digest ^ word) * 0x9e3779b97f4a7c15u;
  return product << 29 | product >> 35;
}

std::uint64_t digest_of(const Piece& piece) {
  const char* from = static_cast<const char*>(piece.address);
  std::uint64_t chain[kChains], words[kChains];
  for (int n = 0; n < kChains; ++n) chain[n] = n;
  Index at = 0;
  for (; at + Index(sizeof words) <= piece.bytes; at += sizeof words) {
    std::memcpy(words, from + at, sizeof words);
    for (int n = 0; n < kChains; ++n) chain[n] = step(chain[n], words[n]);
  }
  std::memset(words, 0, sizeof words);
  std::memcpy(words, from + at, piece.bytes - at);
  std::uint64_t digest = piece.bytes;
  for (int n = 0; n < kChains; ++n) digest = step(digest, step(chain[n], words[n]));
  return digest;
}

}  // namespace
}  // namespace taipan

// It does not depend on the threads.
TAIPAN_FUNCTION(digest, Digest) {
  using namespace taipan;
  Index blocks = 0;
  for (Index n = 0; n < call->count; ++n) blocks += (call->pieces[n].bytes + kBlock - 1) / kBlock;
  Scratch& scratch = thread_scratch();
  if (!scratch.reserve(Scratch::bytes<Block>(blocks))) return kNoMemory;
  Block* block = scratch.take<Block>(blocks);
  Index next = 0;
  for (Index n = 0; n < call->count; ++n) {
    const Piece& piece = call->pieces[n];
    const char* address = static_cast<const char*>(piece.address);
    for (Index at = 0; at < piece.bytes; at += kBlock)
      block[next++] = {{address + at, std::min(kBlock, piece.bytes - at)}, 0};
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (blocks > 1)
  for (Index n = 0; n < blocks; ++n) block[n].digest = digest_of(block[n].piece);
  std::uint64_t digest = call->count;
  for (Index n = 0; n < blocks; ++n) digest = step(digest, block[n].digest);
  std::memcpy(call->result, &digest, sizeof digest);
  return kOk;
}
