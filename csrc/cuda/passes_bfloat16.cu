// One precision a file: they compile side by side.
#include "passes.h"

template struct fa::cuda::Passes<fa::cuda::Precision::kBFloat16>;
