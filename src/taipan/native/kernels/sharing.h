// How work is shared out to threads.
#pragma once

#include <algorithm>
#include <cstddef>

namespace taipan {

// Heads of each of `groups` groups, up to 6, that a thread takes together, so that the one that gets most has least to
// do. A head alone takes 1.18 of the time that it takes beside others, two take 1.03.
inline std::ptrdiff_t heads_together(std::ptrdiff_t groups, std::ptrdiff_t heads, int threads) {
  std::ptrdiff_t best = 1;
  double least = 0;
  for (std::ptrdiff_t together = 1; together <= std::min<std::ptrdiff_t>(6, heads); ++together) {
    const std::ptrdiff_t tasks = groups * ((heads + together - 1) / together), rounds = (tasks + threads - 1) / threads;
    const double alone = together == 1 ? 1.18 : together == 2 ? 1.03 : 1.0;
    const double time = alone * static_cast<double>(rounds * together);
    if (together == 1 || time < least) {
      best = together;
      least = time;
    }
  }
  return best;
}

}  // namespace taipan
