/* A run of a layer: which kernel, and where its buffers stand in the workspace. */
#include "device.h"
#include "nvfp4_layout.h"

bool moe4_cuda_uses_sm90(const struct moe4_cuda_device *device) {
    return device->major == 9;
}

/* docs/hopper.md has the measurements. */
#define PREFILL_APART 17  /* slots of an expert that the prefill kernel takes, where it cannot take all */
#define PREFILL_FEW 65    /* where experts get few on average: a few that go another way cost more than they gain */
#define PREFILL_TOKENS 64 /* of a batch from which it may take several experts; the rows of one keep too few multiprocessors busy */

/* Slots an expert gets on average from where on the prefill kernel takes all: later where h is rounded. */
static int prefill_mean(const struct moe4_layer_run *r) {
    return r->act == MOE4_ACT_W4A16 ? 13 : 16;
}

/* Columns of the prefill kernel's tiles, up to so many slots an expert on average. */
static const struct width {
    int columns;
    double up_to;
} WIDTHS[] = {{80, 68}, {192, 165}, {256, 235}, {192, INT32_MAX}};
enum { LEAST_COLUMNS = 8, LEAST_PREFILL_COLUMNS = 80 }; /* of decode's tiles; of prefill's */

/* The prefill kernel's items: columns and row tiles at most. */
static const struct item { int columns, row_tiles; } ITEMS[] = {{80, 6}, {192, 3}, {256, 2}};
enum { N_ITEMS = sizeof ITEMS / sizeof *ITEMS };

/* What the rows of one expert cost: it has few items, which the multiprocessors take in whole rounds. Cycles of a 64 x 64 unit by
 * docs/hopper.md: few columns cost the decoding, many the tensor cores. */
static double rounds_cost(const struct item *item, long long rows, int row_tiles, int n_sms) {
    long long tiles = (rows + item->columns - 1) / item->columns, columns = (rows + tiles - 1) / tiles;
    long long items = tiles * ((row_tiles + item->row_tiles - 1) / item->row_tiles);
    double few = 97 + 1.1 * (double)columns, many = 10 + 2. * (double)columns;
    return (double)((items + n_sms - 1) / n_sms) * item->row_tiles * (few > many ? few : many);
}

static const struct item *best_item(long long rows, int row_tiles, int n_sms) {
    const struct item *best = ITEMS;
    for (int i = 1; i < N_ITEMS; i++)
        if (rounds_cost(&ITEMS[i], rows, row_tiles, n_sms) < rounds_cost(best, rows, row_tiles, n_sms)) best = &ITEMS[i];
    return best;
}

double moe4_cuda_unit_cycles(long long rows, int row_tiles, int n_sms) {
    return rounds_cost(best_item(rows, row_tiles, n_sms), rows, row_tiles, n_sms);
}

static int prefill_columns(const struct moe4_layer_run *r, double per_expert, int n_sms) {
    int width = 0;
    if (r->w.n == 1) return best_item(r->n_tokens, r->w.down_tiles, n_sms)->columns;
    while (per_expert > WIDTHS[width].up_to) width++;
    return WIDTHS[width].columns;
}

/* Tokens of a batch from which the prefill kernel may take all. */
static int least_tokens(const struct moe4_layer_run *r) {
    return r->w.n > 1 ? PREFILL_TOKENS : MOE4_PREFILL_TOKENS;
}

static int prefill_from(const struct moe4_layer_run *r, double per_expert) {
    if (per_expert >= prefill_mean(r) && r->n_tokens >= least_tokens(r)) return moe4_cuda_rounds_apart(r) ? PREFILL_APART : 1;
    return r->n_tokens >= MOE4_PREFILL_TOKENS ? PREFILL_FEW : 0;
}

/* From the slots an expert gets on average, which the host knows; what an expert really gets only the device knows, and there a tile
 * takes as many columns as it has. An expert with many slots goes to the prefill kernel, wherever the batch is large enough to hold one. */
void moe4_cuda_choose_kernel(struct moe4_layer_run *r, const struct moe4_cuda_device *device) {
    long long slots = (long long)r->n_tokens * r->top_k, experts = slots < r->w.n ? slots : r->w.n;
    double per_expert = experts ? (double)slots / (double)experts : 0;
    bool plain = r->act != MOE4_ACT_BF16 && !moe4_cuda_has_options(r);
    r->prefill_from = moe4_cuda_uses_sm90(device) && plain ? prefill_from(r, per_expert) : 0;
    if (r->prefill_from) r->prefill_columns = prefill_columns(r, per_expert, device->n_sms);
    r->tile_columns = r->n_tokens <= 8 || per_expert < 3 ? LEAST_COLUMNS : per_expert <= 6 ? 16 : 24;
}

/* The largest batch that leaves experts with few slots to decode, where larger ones do not: it may need more memory than they do. */
size_t moe4_cuda_last_mixed_batch(const struct moe4_layer_run *r) {
    size_t last = ((size_t)r->w.n * (size_t)prefill_mean(r) - 1) / (size_t)r->top_k, fewest = (size_t)least_tokens(r) - 1;
    return last < fewest ? fewest : last;
}

/* Of the routed experts' products. */
const char *moe4_cuda_kernels_name(const struct moe4_layer_run *r, const struct moe4_cuda_device *device) {
    if (r->act == MOE4_ACT_BF16) return "fp32";
    if (!moe4_cuda_uses_sm90(device)) return "portable";
    if (r->prefill_from) return r->prefill_from > 1 ? "decode sm_90, prefill sm_90" : "prefill sm_90";
    return moe4_cuda_has_options(r) ? "portable, decode sm_90" : "decode sm_90";
}

size_t moe4_cuda_kernel_ranges(moe4_kernel_range range[MOE4_MAX_KERNEL_RANGES], const struct moe4_layer_run *r,
                               const struct moe4_cuda_device *device) {
    size_t n = 0;
    if (r->act == MOE4_ACT_BF16 || !moe4_cuda_uses_sm90(device) || moe4_cuda_has_options(r))
        range[n++] = (moe4_kernel_range){moe4_cuda_kernels_name(r, device), 1, (size_t)r->tile_columns};
    else if (r->prefill_from != 1)
        range[n++] = (moe4_kernel_range){"decode sm_90", 1, (size_t)r->tile_columns};
    if (r->prefill_from) range[n++] = (moe4_kernel_range){"prefill sm_90", (size_t)r->prefill_from, (size_t)r->prefill_columns};
    return n;
}

/* Prepare serves slots by id whose rows are neither NVFP4 already nor weighted, nor stay fp32; round_rows everything else. */
bool moe4_cuda_rounds_apart(const struct moe4_layer_run *r) {
    return r->slots_are != MOE4_SLOTS_BY_ID || r->x_by_slot || r->act == MOE4_ACT_BF16 || r->x_dtype == MOE4_NVFP4;
}

/* x_tiles and o of a batch whose experts all take prefill. Up to WINDOW_BYTES for both they stand beside each other, and gate/up goes on to
 * down; past that they share the memory of one window or one slice. The size never falls where n_tokens grows. */
#define WINDOW_BYTES ((size_t)304 << 20)

static void carve_windows(struct moe4_carver *c, struct moe4_layer_run *r, size_t slots, size_t experts) {
    size_t x_row = (size_t)r->w.hidden_units * MOE4_UNIT_K * sizeof *r->x_tiles, o_row = (size_t)r->w.hidden * sizeof *r->o, x = 0, o = 0;
    size_t margin = (15 * experts + 288) * x_row, slack = slots * MOE4_UNIT_ROWS * sizeof *r->o; /* of a window; of a slice */
    c->overflow |= !moe4_mul(&x, moe4_prefill_rows(slots, experts), x_row) || !moe4_mul(&o, slots, o_row);
    if (c->overflow) return;
    if (!r->may_slice || (x <= WINDOW_BYTES && o <= WINDOW_BYTES - x)) {
        r->x_tiles = moe4_carve(c, x, 1);
        r->o = moe4_carve(c, o, 1);
        return;
    }
    size_t most = x > o ? x : o, bytes = most / MOE4_MAX_WINDOWS > WINDOW_BYTES ? most / MOE4_MAX_WINDOWS + 1 : WINDOW_BYTES;
    r->n_windows = (int)((x + bytes - 1) / bytes);
    r->n_slices = (int)((o + bytes - 1) / bytes);
    r->window_slots = (int)((slots / (size_t)r->n_windows + 16) & ~(size_t)15);
    r->window_state = moe4_carve(c, MOE4_MAX_WINDOWS, sizeof *r->window_state);
    r->window_tiles = moe4_carve(c, (size_t)r->max_prefill_tiles, MOE4_MAX_WINDOWS * sizeof *r->window_tiles);
    r->x_tiles = moe4_carve(c, bytes + (margin > slack ? margin : slack), 1);
    r->o = (float *)r->x_tiles;
}

/* The one walk for the size query and the carve-up. A workspace must serve every batch up to the one that it was asked for, so no size here
 * may fall where n_tokens grows, but past moe4_cuda_last_mixed_batch: lists have room for the narrowest tiles, whatever choose_kernel
 * set. Without gate/up (a linear), h is x. */
void moe4_cuda_carve_run(struct moe4_carver *c, struct moe4_layer_run *r, bool with_gate_up) {
    size_t tokens = (size_t)r->n_tokens, slots = tokens * (size_t)r->top_k;
    size_t experts = slots < (size_t)r->w.n ? slots : (size_t)r->w.n;
    size_t x_rows = r->act == MOE4_ACT_STATIC || r->x_by_slot ? slots : tokens;
    size_t x_units = (size_t)(with_gate_up ? r->w.hidden_units : r->w.intermediate_units);
    moe4_act act_h = r->act_h == MOE4_ACT_DEFAULT ? r->act : r->act_h;
    bool plain = r->act == MOE4_ACT_BF16, rounds_x = !plain && r->act != MOE4_ACT_W4A16;
    bool all_tiled = r->prefill_from && !with_gate_up && r->slots_are == MOE4_SLOTS_BY_ID; /* a linear has one expert for all rows */
    bool plain_h = act_h == MOE4_ACT_BF16, rounds_h = !plain_h && act_h != MOE4_ACT_W4A16;
    bool takes_all = r->prefill_from == 1 && with_gate_up;
    r->max_tiles = (int)(slots / LEAST_COLUMNS + experts);
    r->state = moe4_carve(c, 1, sizeof *r->state); /* first: the report looks for it at the workspace's start */
    r->tiles = moe4_carve(c, (size_t)r->max_tiles, sizeof *r->tiles);
    r->slots = moe4_carve(c, slots, sizeof *r->slots);
    r->expert_slots = moe4_carve(c, (size_t)r->w.n, sizeof *r->expert_slots);
    r->share_counts = moe4_cuda_share_slots(r) ? moe4_carve(c, (size_t)r->w.n, MOE4_SHARES * sizeof *r->share_counts) : NULL;
    r->row_start = r->slots_are != MOE4_SLOTS_BY_ID ? moe4_carve(c, (size_t)r->w.n + 1, sizeof *r->row_start) : NULL;
    r->done = moe4_carve(c, (size_t)r->max_tiles, sizeof *r->done);
    r->ready = moe4_carve(c, (size_t)r->max_tiles, sizeof *r->ready);
    if (r->prefill_from) {
        size_t tiles = slots / LEAST_PREFILL_COLUMNS + experts, rows = moe4_prefill_rows(slots, (size_t)r->w.n);
        r->max_prefill_tiles = (int)tiles;
        r->prefill_tiles = moe4_carve(c, tiles, sizeof *r->prefill_tiles);
        r->prefill_done = moe4_carve(c, tiles, sizeof *r->prefill_done);
        r->prefill_rounds = rounds_h && act_h != MOE4_ACT_TENSOR && with_gate_up
                                ? moe4_carve(c, moe4_prefill_parts(slots, tiles), sizeof *r->prefill_rounds)
                                : NULL;
        r->x_places = moe4_carve(c, slots, sizeof *r->x_places);
        if (takes_all)
            carve_windows(c, r, slots, experts);
        else
            r->x_tiles = moe4_carve(c, rows, x_units * MOE4_UNIT_K * sizeof *r->x_tiles);
        r->h_tiles = with_gate_up ? moe4_carve(c, rows, (size_t)r->w.intermediate_units * MOE4_UNIT_K * sizeof *r->h_tiles) : r->x_tiles;
    }
    if (!r->x_is_ready) {
        r->x = plain || all_tiled || (takes_all && !r->x_is_kept) ? NULL : moe4_carve(c, x_rows, x_units * MOE4_UNIT_K * sizeof *r->x);
        r->x_wide = plain ? moe4_carve(c, x_rows, x_units * MOE4_UNIT_K * sizeof *r->x_wide) : NULL;
        r->x_factor = rounds_x || r->x_dtype == MOE4_NVFP4 ? moe4_carve(c, x_rows, sizeof *r->x_factor) : NULL;
        r->x_saturated = moe4_carve(c, x_rows, sizeof *r->x_saturated);
        r->x_bad = moe4_carve(c, x_rows, sizeof *r->x_bad);
        r->x_amax = moe4_carve(c, r->slots_are == MOE4_SLOTS_DIAGONAL ? (size_t)r->w.n : 1, sizeof *r->x_amax);
    }
    if (with_gate_up) {
        size_t width = (size_t)r->w.intermediate_units * MOE4_UNIT_K;
        r->h = plain_h || takes_all ? NULL : moe4_carve(c, slots, width * sizeof *r->h);
        r->h_wide = rounds_h || plain_h ? moe4_carve(c, slots, width * sizeof *r->h_wide) : NULL;
        r->h_amax = rounds_h ? moe4_carve(c, slots + 1, sizeof *r->h_amax) : NULL;
        r->h_factor = rounds_h ? moe4_carve(c, slots, sizeof *r->h_factor) : NULL;
        r->h_saturated = rounds_h ? moe4_carve(c, slots, sizeof *r->h_saturated) : NULL;
        if (!takes_all) r->o = moe4_carve(c, slots, (size_t)r->w.hidden * sizeof *r->o);
    }
}
