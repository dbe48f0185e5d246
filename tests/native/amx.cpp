// AMX in software, for processors without it: preloaded (LD_PRELOAD), it executes each tile instruction that the processor
// refuses as the Software Developer's Manual of Intel describes it (volume 2: LDTILECFG, TILELOADD, TDPBF16PS, …), and
// answers the request for permission (arch_prctl) in place of a system without AMX. It is as strict as a processor: a tile
// instruction without permission or without a configuration ends the process.
//
// When the process ends it writes how many products it has made to the file that TAIPAN_TEST_AMX names, if any.
#include <dlfcn.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Tile {
  int rows, row_bytes;
  std::uint8_t row[16][64];
};

struct Registers {
  bool configured;
  Tile tile[8];
};

thread_local Registers registers __attribute__((tls_model("initial-exec")));
std::atomic<bool> permitted{false};
std::atomic<long> products{0};

[[noreturn]] void refuse(const char* why) {
  std::fprintf(stderr, "AMX in software: %s\n", why);
  std::abort();
}

void load_configuration(const std::uint8_t* from) {
  if (from[0] != 1) refuse("the palette is not 1");
  if (from[1] != 0) refuse("start_row is not 0");
  std::memset(&registers, 0, sizeof registers);
  registers.configured = true;
  for (int t = 0; t < 16; ++t) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, from + 16 + 2 * t, 2);
    const int rows = from[48 + t];
    if (t >= 8 ? rows || row_bytes : rows > 16 || row_bytes > 64 || row_bytes % 4) refuse("a tile has no such shape");
    if (t < 8) registers.tile[t].rows = rows, registers.tile[t].row_bytes = row_bytes;
  }
}

Tile& tile(int number) {
  if (!registers.configured) refuse("tiles are used without a configuration");
  Tile& found = registers.tile[number];
  if (found.rows == 0 || found.row_bytes == 0) refuse("a tile that is not configured is used");
  return found;
}

float from_bfloat16(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Subnormal numbers count as 0, before and after; rounding is to nearest, whatever the program has set.
void multiply(Tile& c, const Tile& a, const Tile& b) {
  if (c.rows != a.rows || c.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows) refuse("tiles do not fit each other");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8040);
  for (int m = 0; m < c.rows; ++m) {
    float sums[32] = {}, row[16];
    for (int k = 0; k < a.row_bytes / 4; ++k)
      for (int lane = 0; lane < c.row_bytes / 2; ++lane) {
        std::uint16_t left, right;
        std::memcpy(&left, a.row[m] + 4 * k + 2 * (lane % 2), 2);
        std::memcpy(&right, b.row[k] + 2 * lane, 2);
        sums[lane] = _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(from_bfloat16(left)), _mm_set_ss(from_bfloat16(right)),
                                                _mm_set_ss(sums[lane])));
      }
    std::memcpy(row, c.row[m], sizeof row);
    for (int n = 0; n < c.row_bytes / 4; ++n) row[n] += sums[2 * n] + sums[2 * n + 1];
    std::memcpy(c.row[m], row, c.row_bytes);
  }
  _mm_setcsr(before);
  ++products;
}

// Register numbers of the instruction set in the order of the context.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// Executes the instruction at `code` if it is one of AMX; its length, or 0.
int execute(const std::uint8_t* code, const greg_t* general) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x80) || (code[2] & 0x04)) return 0;  // VEX.128.0F38.W0
  const bool R = !(code[1] & 0x80), X = !(code[1] & 0x40), B = !(code[1] & 0x20);
  const int prefix = code[2] & 3, third = ~code[2] >> 3 & 15, operation = code[3];  // prefix: none, 66, F3, F2
  const int mod = code[4] >> 6, first = code[4] >> 3 & 7, second = code[4] & 7;
  if (operation != 0x49 && operation != 0x4b && operation != 0x5c) return 0;
  if (R) return 0;
  if (!permitted) refuse("a tile instruction before permission was asked for");

  if (operation == 0x5c) {  // TDPBF16PS first, second, third
    if (prefix != 2 || mod != 3 || third > 7) return 0;
    multiply(tile(first), tile(second), tile(third));
    return 5;
  }
  if (mod == 3) {
    if (operation == 0x49 && prefix == 0 && code[4] == 0xc0) {  // TILERELEASE
      std::memset(&registers, 0, sizeof registers);
      return 5;
    }
    if (operation == 0x49 && prefix == 3 && second == 0) {  // TILEZERO
      std::memset(tile(first).row, 0, sizeof registers.tile[0].row);
      return 5;
    }
    return 0;
  }

  int length = 5;
  std::int64_t address = 0, step = 0;
  if (second == 4) {
    const int scale = code[5] >> 6, index = (code[5] >> 3 & 7) | X << 3, base = (code[5] & 7) | B << 3;
    if ((code[5] & 7) == 5 && mod == 0) refuse("an address without a base");
    address = general[kRegisters[base]];
    if (index != 4) step = general[kRegisters[index]] << scale;
    length = 6;
  } else if (second == 5 && mod == 0) {  // relative to the next instruction
    std::int32_t distance;
    std::memcpy(&distance, code + 5, 4);
    address = reinterpret_cast<std::int64_t>(code) + 9 + distance;
    length = 9;
  } else {
    address = general[kRegisters[second | B << 3]];
  }
  if (mod == 1) {
    address += static_cast<std::int8_t>(code[length]);
    length += 1;
  } else if (mod == 2) {
    std::int32_t distance;
    std::memcpy(&distance, code + length, 4);
    address += distance;
    length += 4;
  }

  auto* memory = reinterpret_cast<std::uint8_t*>(address);
  if (operation == 0x49) {  // LDTILECFG
    if (prefix != 0 || first != 0) return 0;
    load_configuration(memory);
    return length;
  }
  if (second != 4 || prefix == 0) return 0;
  Tile& moved = tile(first);
  for (int m = 0; m < moved.rows; ++m) {
    if (prefix == 2) {  // TILESTORED
      std::memcpy(memory + m * step, moved.row[m], moved.row_bytes);
    } else {  // TILELOADD, TILELOADDT1
      std::memset(moved.row[m], 0, sizeof moved.row[m]);
      std::memcpy(moved.row[m], memory + m * step, moved.row_bytes);
    }
  }
  return length;
}

void handle(int number, siginfo_t*, void* context) {
  greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = execute(reinterpret_cast<const std::uint8_t*>(general[REG_RIP]), general);
  if (length == 0) signal(number, SIG_DFL);  // it comes again, and ends the process
  general[REG_RIP] += length;
}

struct Installed {
  Installed() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
  }
  ~Installed() {
    const char* path = std::getenv("TAIPAN_TEST_AMX");
    if (path == nullptr || products == 0) return;
    if (std::FILE* file = std::fopen(path, "a")) {
      std::fprintf(file, "%ld\n", products.load());
      std::fclose(file);
    }
  }
} installed;

}  // namespace

extern "C" long syscall(long number, ...) {
  using Function = long (*)(long, ...);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "syscall"));
  std::va_list list;
  va_start(list, number);
  long argument[6];
  for (long& value : argument) value = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && argument[0] == 0x1023 && argument[1] == 18) {
    permitted = true;
    return 0;
  }
  return real(number, argument[0], argument[1], argument[2], argument[3], argument[4], argument[5]);
}
