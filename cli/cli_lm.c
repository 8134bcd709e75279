#include "cli_lm.h"

#include <stdio.h>
#include <string.h>

int cli_lm_fail(const struct cli_lm *m, moe4_status status, const char *what) {
    const char *why = m->lm.error;
    size_t n = strlen(what);
    if (strncmp(why, what, n) == 0 && strncmp(why + n, ": ", 2) == 0) why += n + 2; /* it already begins with the thing */
    return cli_error(status == MOE4_ERROR_ARGUMENT ? CLI_BAD_USAGE : CLI_BAD_DATA, what, "%s", *why ? why : moe4_status_text(status));
}

int cli_lm_open(struct cli_lm *m, const char *path, const char *act, const struct cli_common *common) {
    moe4_act mode = MOE4_ACT_DEFAULT;
    *m = (struct cli_lm){.model = NULL};
    if (act && moe4_act_from_name(&mode, act) != MOE4_OK)
        return cli_error(CLI_BAD_USAGE, "--act", "\"%s\" is unknown (moe4 has: w4a16, static, tensor, token, bf16)", act);
    int exit_status = cli_open_ctx(&m->lm.ctx, common);
    if (exit_status != CLI_FINE) return exit_status;
    if (cli_on_device(common)) snprintf(m->products, sizeof m->products, "%s, the rest on ", moe4_ctx_device(m->lm.ctx));
    moe4_status status = lm_model_open(&m->model, &m->lm, path, mode);
    return status == MOE4_OK ? CLI_FINE : cli_lm_fail(m, status, path);
}

const char *cli_lm_products(const struct cli_lm *m) {
    return m->products;
}

void cli_lm_close(struct cli_lm *m) {
    lm_model_close(m->model);
    moe4_ctx_destroy(m->lm.ctx);
}
