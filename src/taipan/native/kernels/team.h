// Threads of one parallel region that share loops and meet between them.
//
// OpenMP's barrier spins for milliseconds, as long as a token takes. On a busy processor it takes this time from the
// thread it waits for. Here a thread spins for some microseconds and then sleeps. OpenMP splits loops before they begin;
// here a finished thread takes pieces that others have not begun, because one of two cores is often slower.
#pragma once

#include <atomic>

#include "simd.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace taipan {

// A thread of a team.
struct Part {
  Index number, count;

  Index begin(Index n) const { return n * number / count; }
  Index end(Index n) const { return n * (number + 1) / count; }
};

class Team {
 public:
  static constexpr int kLoops = 4;  // between two meetings, at most

  // State of one thread.
  struct Member {
    Part part;
    unsigned phase = 0;
    int loop = 0;
  };

  static std::size_t bytes(Index threads) { return sizeof(Claims) * kLoops * threads; }

  // At most `threads`; `memory` has as many bytes as `bytes` says, aligned to 64.
  Team(Index threads, void* memory) : claims_(static_cast<Claims*>(memory)), threads_(threads) {
    for (Index n = 0; n < kLoops * threads_; ++n) new (claims_ + n) Claims;
  }

  // A barrier: every thread calls it, and none returns before all have.
  void wait(Member& me) {
    me.loop = 0;
    if (me.part.count == 1) return;
    const unsigned phase = me.phase++;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == me.part.count) {
      for (Index n = 0; n < kLoops * threads_; ++n) claims_[n].taken.store(0, std::memory_order_relaxed);
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      phase_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      relax();
    }
    while (phase_.load(std::memory_order_acquire) == phase) phase_.wait(phase, std::memory_order_acquire);
  }

  // f(begin, end) for pieces of [0, count), each of `grain` but the last. Every thread calls it with the same numbers. It
  // returns when no piece is left to begin; other threads may still be working.
  template <class F>
  void share(Member& me, Index count, Index grain, F&& f) {
    if (me.part.count == 1) {
      if (count > 0) f(Index(0), count);
      return;
    }
    Claims* claims = claims_ + threads_ * me.loop++;
    const Index pieces = (count + grain - 1) / grain;
    for (Index n = 0; n < me.part.count; ++n) {
      const Part of{(me.part.number + n) % me.part.count, me.part.count};
      const Index begin = of.begin(pieces), end = of.end(pieces);
      for (;;) {
        const Index taken = claims[of.number].take(end - begin, n > 0);
        if (taken < 0) break;
        const Index piece = begin + taken;
        f(piece * grain, std::min((piece + 1) * grain, count));
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;  // some tens of microseconds

  // Pieces taken from a thread's share: by itself from the front, by others from the back.
  struct alignas(64) Claims {
    std::atomic<std::uint64_t> taken{0};

    // The number of a piece of `count`, or -1.
    Index take(Index count, bool from_back) {
      std::uint64_t now = taken.load(std::memory_order_relaxed);
      for (;;) {
        const Index front = static_cast<Index>(now & 0xffffffffu), back = static_cast<Index>(now >> 32);
        if (front + back >= count) return -1;
        const std::uint64_t next = now + (from_back ? std::uint64_t(1) << 32 : 1);
        if (taken.compare_exchange_weak(now, next, std::memory_order_relaxed)) return from_back ? count - 1 - back : front;
      }
    }
  };

  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Claims* claims_;
  Index threads_;
  alignas(64) std::atomic<Index> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

}  // namespace taipan
