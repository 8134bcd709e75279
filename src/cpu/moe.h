/* The CPU's stages of a layer, and what it keeps of prepared experts. */
#ifndef MOE4_CPU_MOE_H
#define MOE4_CPU_MOE_H

#include "../backend.h"
#include "kernels.h"
#include "pack.h"

struct moe4_cpu_expert {
    struct moe4_matrix gate, up, down;
};

struct moe4_cpu_experts {
    const struct moe4_kernels *kernels;
    const struct moe4_gemm *x, *h; /* the products that read x and h */
    struct moe4_store packed;      /* all matrices' packed forms */
    struct moe4_cpu_expert expert[];
};

/* One group's part of the workspace. */
struct moe4_cpu_group {
    const struct moe4_experts *set;
    const struct moe4_cpu_experts *cpu;
    bool routed; /* positions come from topk_ids; otherwise from the call's rows, or position = token */
    size_t n_pos, n_hit;
    int32_t *start;           /* [n + 1] positions of expert e: start[e] .. start[e + 1) */
    int32_t *hit;             /* [n_hit] experts with a position, those with most of them first */
    int32_t *token;           /* [n_pos] the row of x */
    int32_t *pos_of_slot;     /* routed: [T * k], -1 for a slot that does not run here */
    float *x_scale, *h_scale; /* STATIC: [n_pos] input scales */
    float *weight;            /* [n_pos] routing weights that go on x or h, or on a row's result; NULL where combine takes the slots' own */
    bool x_by_pos;            /* x rows are packed for each position rather than each token */
    void *x_rows, *h_rows;
    float *x_factor, *h_factor;
    const void **x_row, **h_row; /* [n_pos] into x_rows, h_rows */
    float *h, *o;                /* [n_pos, intermediate], [n_pos, hidden] */
};

struct moe4_cpu_state {
    const moe4_moe *moe; /* whose last forward this workspace carries */
    size_t n_tokens, n_groups;
    int32_t *token_start, *token_pos; /* rows summed by token: positions token_pos[token_start[t]] .. of token t, in order of row */
    moe4_moe_report report;
    struct moe4_cpu_group group[MOE4_MAX_GROUPS];
    float *scratch; /* a row for each packing task, a row for each combining task */
    char *lanes;    /* [threads][lane_bytes] gate's and up's outputs and what a product needs */
    size_t lane_bytes;
    double lap;
};

/* Whether a group reads the rows of x that the first group packed. */
bool moe4_cpu_shares_x(const struct moe4_moe_call *c, size_t group);
/* Notes the time since the last stage ended. */
void moe4_cpu_lap(struct moe4_cpu_state *s, moe4_stage stage);

bool moe4_cpu_moe_bytes(size_t *bytes, const struct moe4_moe_call *c);
moe4_status moe4_cpu_begin(const struct moe4_moe_call *c);
moe4_status moe4_cpu_dispatch(const struct moe4_moe_call *c);
moe4_status moe4_cpu_quantize_x(const struct moe4_moe_call *c);
moe4_status moe4_cpu_gate_up(const struct moe4_moe_call *c);
moe4_status moe4_cpu_quantize_h(const struct moe4_moe_call *c);
moe4_status moe4_cpu_down(const struct moe4_moe_call *c);
moe4_status moe4_cpu_combine(const struct moe4_moe_call *c);
moe4_status moe4_cpu_report(const struct moe4_moe_call *c, moe4_moe_report *report, uint64_t *tokens_per_expert);

#endif
