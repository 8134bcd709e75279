/* The CPU's table of stages, and how it prepares experts. */
#include "../backend.h"
#include "grouped.h"
#include "linear.h"
#include "moe.h"
#include "pack.h"
#include "select.h"

const struct moe4_gemm *moe4_cpu_gemm(const struct moe4_kernels *k, moe4_dtype dtype, moe4_act act) {
    if (dtype != MOE4_NVFP4) return k->wide;
    return act == MOE4_ACT_W4A16 ? k->w4a16 : k->w4a4;
}

static moe4_status pack_experts(moe4_ctx *ctx, struct moe4_cpu_experts *p, size_t n) {
    struct moe4_pack *packs = moe4_calloc(ctx, 3 * n, sizeof *packs, "experts to pack");
    if (!packs) return MOE4_ERROR_MEMORY;
    for (size_t e = 0; e < n; e++) {
        packs[3 * e] = (struct moe4_pack){.gemm = p->x, .matrix = &p->expert[e].gate};
        packs[3 * e + 1] = (struct moe4_pack){.gemm = p->x, .matrix = &p->expert[e].up};
        packs[3 * e + 2] = (struct moe4_pack){.gemm = p->h, .matrix = &p->expert[e].down};
    }
    moe4_status status = moe4_pack(&p->packed, ctx, packs, 3 * n);
    moe4_free(ctx, packs);
    return status;
}

static moe4_status experts_prepare(moe4_ctx *ctx, struct moe4_experts *experts) {
    struct moe4_cpu_experts *p = moe4_calloc(ctx, 1, sizeof *p + experts->n * sizeof *p->expert, "experts");
    if (!p) return MOE4_ERROR_MEMORY;
    experts->prepared = p;
    p->kernels = ctx->kernels;
    p->x = moe4_cpu_gemm(ctx->kernels, experts->expert->up.dtype, experts->act_x);
    p->h = moe4_cpu_gemm(ctx->kernels, experts->expert->down.dtype, experts->act_h);
    for (size_t e = 0; e < experts->n; e++) {
        const moe4_expert *x = &experts->expert[e];
        p->expert[e] = (struct moe4_cpu_expert){{.w = x->gate}, {.w = x->up}, {.w = x->down}};
    }
    return pack_experts(ctx, p, experts->n);
}

static void experts_release(moe4_ctx *ctx, struct moe4_experts *experts) {
    struct moe4_cpu_experts *p = experts->prepared;
    if (p) moe4_store_free(ctx, &p->packed);
    moe4_free(ctx, p);
}

/* The new weights take the old ones' place in the packed store. */
static moe4_status expert_replaced(moe4_ctx *ctx, struct moe4_experts *experts, size_t e) {
    struct moe4_cpu_experts *p = experts->prepared;
    const moe4_expert *x = &experts->expert[e];
    struct moe4_cpu_expert *old = &p->expert[e];
    old->gate.w = x->gate;
    old->up.w = x->up;
    old->down.w = x->down;
    struct moe4_pack packs[] = {
        {.gemm = p->x, .matrix = &old->gate}, {.gemm = p->x, .matrix = &old->up}, {.gemm = p->h, .matrix = &old->down}};
    moe4_repack(ctx, packs, 3);
    return MOE4_OK;
}

const struct moe4_backend moe4_backend_cpu = {
    .name = "cpu",
    .experts_prepare = experts_prepare,
    .experts_release = experts_release,
    .expert_replaced = expert_replaced,
    .moe_bytes = moe4_cpu_moe_bytes,
    .begin = moe4_cpu_begin,
    .dispatch = moe4_cpu_dispatch,
    .quantize_x = moe4_cpu_quantize_x,
    .gate_up = moe4_cpu_gate_up,
    .quantize_h = moe4_cpu_quantize_h,
    .down = moe4_cpu_down,
    .combine = moe4_cpu_combine,
    .report = moe4_cpu_report,
    .linear_prepare = moe4_cpu_linear_prepare,
    .linear_release = moe4_cpu_linear_release,
    .linear_bytes = moe4_cpu_linear_bytes,
    .linear_forward = moe4_cpu_linear_forward,
    .grouped_prepare = moe4_cpu_grouped_prepare,
    .grouped_release = moe4_cpu_grouped_release,
    .grouped_bytes = moe4_cpu_grouped_bytes,
    .grouped_forward = moe4_cpu_grouped_forward,
    .select = moe4_cpu_select,
};
