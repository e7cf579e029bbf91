/* The kernels of layers in plain C. */
#include "../simd/portable.h"
#include "layers_template.h"

FA_LAYERS_TABLE(portable)
