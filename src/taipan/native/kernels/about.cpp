// What the library is, for `taipan doctor`: what it was compiled with, and with what the products inside its ops are made
// when tokens are bfloat16 in memory.
#include "products.h"

extern "C" const char* taipan_flags() { return TAIPAN_FLAGS; }

extern "C" const char* taipan_products() {
  const char* name = "";
  taipan::with_products<TAIPAN_REAL, taipan::Bfloat16>([&]<class Products>() {
    name = Products::kName;
    return taipan::kOk;
  });
  return name;
}
