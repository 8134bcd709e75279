#include "checkkernels.h"
void check_gemm(struct check *c) {
    (void)c;
}
