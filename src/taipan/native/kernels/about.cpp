// Describes the library: for `taipan doctor`, its compiler flags and how it multiplies bfloat16 inside its ops; for
// loading, the arguments of its functions.
#include "int4.h"
#include "interface.h"
#include "products.h"

namespace taipan {
namespace {

template <class... Structures>
void describe_all(std::string& out) {
  (describe<Structures>(out), ...);
}

std::string interface() {
  std::string out;
  describe_all<SsdSizes, SsdInputs, SsdForward, SsdBackward, ConvSizes, ConvInputs, ConvForward, ConvBackward, NormSizes,
               NormForward, NormBackward, Mamba2Sizes, Mamba2Inputs, Mamba2Forward, Mamba2Backward, Outranking,
               SwigluForward, SwigluBackward, NormSumSizes, NormSumForward, NormSumBackward, AttentionSizes,
               AttentionPlan, AttentionPlanned, AttentionForward, AttentionBackward, CrossEntropy, AdamW, MuonMatrix,
               Muon, Matrix, DecodeSizes, Layer, State, Decode, Settle, Choice, Choose, Pen, Write, Piece, Digest, Unpack>(out);
#define TAIPAN_DESCRIBE(name, Arguments) out += #name "(" #Arguments ")\n";
  TAIPAN_FUNCTIONS(TAIPAN_DESCRIBE)
  return out;
}

}  // namespace
}  // namespace taipan

extern "C" const char* taipan_flags() { return TAIPAN_FLAGS; }

extern "C" const char* taipan_products() {
  const char* name = "";
  taipan::with_products<TAIPAN_REAL, taipan::Bfloat16>([&]<class Products>() {
    name = Products::kName;
    return taipan::kOk;
  });
  return name;
}

extern "C" const char* taipan_int4() { return taipan::kInt4Products; }

// One structure or function in a line.
extern "C" const char* taipan_interface() {
  static const std::string text = taipan::interface();
  return text.c_str();
}
