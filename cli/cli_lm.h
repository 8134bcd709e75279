/* What the commands that run a whole model share: opening it, its errors. */
#ifndef MOE4_CLI_LM_H
#define MOE4_CLI_LM_H

#include "cli.h"
#include "lm/lm.h"

struct cli_lm {
    struct lm lm;
    struct lm_model *model;
    char products[40];
};

/* The context and the model as the options ask; act is the text of --act or NULL. CLI_FINE, or an exit status with the error printed.
 * Close it either way. */
int cli_lm_open(struct cli_lm *m, const char *path, const char *act, const struct cli_common *common);
void cli_lm_close(struct cli_lm *m);
/* Before the ISA in a report: "cuda:0, the rest on " where products run on a device, otherwise "". */
const char *cli_lm_products(const struct cli_lm *m);
/* Prints lm's sentence about `what`; a refused argument is wrong usage, everything else wrong data. */
int cli_lm_fail(const struct cli_lm *m, moe4_status status, const char *what);

#define CLI_LM_ACT_HELP "round the inputs of NVFP4 matrices: w4a16, static, tensor or token (token)"

#endif
