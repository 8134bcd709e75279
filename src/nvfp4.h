/* The NVFP4 format: what other files need of it beside moe4.h. */
#ifndef MOE4_NVFP4_H
#define MOE4_NVFP4_H

#include "moe4.h"

/* The number a recipe stores for a tensor (or row) of this amax; always positive and finite. */
float moe4_nvfp4_global(moe4_recipe recipe, float amax, int four_over_six);

#endif
