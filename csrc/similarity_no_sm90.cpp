// Stands in for similarity_sm90.cu in a build without sm_90a.
#include <cstdint>

#include "isa.h"

namespace ffcl {

struct SumsArgs;
struct PanelArgs;

bool sm90_built() { return false; }
int sums_sm90(const SumsArgs&, int, int64_t, void*) { return not_built; }
int panel_sm90(const PanelArgs&, int, int, void*) { return not_built; }

}  // namespace ffcl
