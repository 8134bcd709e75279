/* Many slots an expert, where a device goes from one kernel to another and from one width of tiles to the next: every form of rows, linears
 * and groups beside the CPU, each call twice with the same bits. Skipped (77) where there is no GPU. */
#include "calls.h"

/* Slots of the experts. The first 14 get so few on average that tiles are the narrowest, the first 17 take the next width, all the third;
 * batched rows have room for so many that they take the widest. Some experts of every call go to the kernel for few slots. */
static const int32_t EDGES[] = {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 1000};
enum { MOST = sizeof EDGES / sizeof *EDGES, WIDEST = 1000 };
static const size_t COUNTS[] = {14, 17, MOST};

struct routing {
    size_t n_experts, n_slots;
    int32_t offsets[MOST + 1];
    int32_t *expert; /* of the slots in any order; -1 behind them, up to an even number */
};

static struct routing make_routing(size_t n_experts) {
    struct routing r = {.n_experts = n_experts};
    for (size_t e = 0; e < n_experts; e++) r.offsets[e + 1] = r.offsets[e] + EDGES[e];
    r.n_slots = (size_t)r.offsets[n_experts];
    r.expert = malloc((r.n_slots + 2) * sizeof *r.expert);
    r.expert[r.n_slots] = r.expert[r.n_slots + 1] = -1;
    for (size_t e = 0, i = 0; e < n_experts; e++)
        for (int32_t j = 0; j < EDGES[e]; j++) r.expert[i++] = (int32_t)e;
    for (size_t i = r.n_slots; i > 1; i--) {
        size_t j = ref_random() % i;
        int32_t e = r.expert[i - 1];
        r.expert[i - 1] = r.expert[j];
        r.expert[j] = e;
    }
    return r;
}

/* Experts whose down has biases, which the kernels for many slots add: those of gate and up keep it away. */
static struct layer make_experts(size_t n, bool bias) {
    struct layer l = random_layer(n, 208, 80, 2, MOE4_NVFP4, MOE4_NVFP4, false);
    for (size_t e = 0; bias && e < n; e += 2) random_bias(&l.expert[e].down);
    return l;
}

static int32_t *copy(const int32_t *v, size_t n) {
    return memcpy(malloc(n * sizeof *v), v, n * sizeof *v);
}

static struct layer_call make_call(const struct layer *l, const struct routing *r, enum form form) {
    struct layer_call c = {.l = l, .form = form, .n_rows = r->n_slots};
    if (form == BY_ID) c.n_rows = (r->n_slots + 1) / 2; /* two slots a token */
    if (form == BATCHED) c.n_rows = l->E * (c.max_rows = WIDEST);
    c.x = random_floats(c.n_rows * l->hidden);
    c.weights = random_routing_weights(c.n_rows * 2);
    c.n_tokens = 300;
    int32_t *token = malloc(c.n_rows * sizeof *token);
    for (size_t i = 0; i < c.n_rows; i++) token[i] = (int32_t)(ref_random() % c.n_tokens);
    c.token = token;
    if (form == BY_ID) c.ids = copy(r->expert, 2 * c.n_rows);
    c.offsets = copy(r->offsets, l->E + 1);
    c.counts = copy(EDGES, l->E);
    return c;
}

static void test_layers(void **state) {
    (void)state;
    static const struct {
        moe4_weighting weighting;
        moe4_dtype x;
    } kinds[] = {{MOE4_WEIGHT_AFTER_DOWN, MOE4_F32},
                 {MOE4_WEIGHT_AFTER_DOWN, MOE4_NVFP4},
                 {MOE4_WEIGHT_ON_X, MOE4_BF16},
                 {MOE4_WEIGHT_ON_X, MOE4_NVFP4}};
    int number = 0;
    for (int n = 0; n < 3; n++) {
        struct routing r = make_routing(COUNTS[n]);
        for (int form = 0; form < N_FORMS; form++)
            for (int m = 0; m < N_MODES; m++)
                for (int kind = 0; kind < 4; kind++, number++) {
                    if (number % every) continue;
                    struct layer l = make_experts(COUNTS[n], number % 3 == 1), s = make_experts(1, false);
                    struct layer_call c = make_call(&l, &r, (enum form)form);
                    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
                    o.n_experts = l.E;
                    o.top_k = 2;
                    o.act = modes[m];
                    o.weighting = kinds[kind].weighting;
                    o.x_dtype = kinds[kind].x;
                    o.y_dtype = number % 2 ? MOE4_BF16 : MOE4_F32;
                    o.shared = form == BY_ID && number % 2 ? s.expert : NULL;
                    c.layout = (moe4_scale_layout)(number % 3);
                    set_activation(&o, number % 3);
                    char what[128];
                    snprintf(what, sizeof what, "%zu experts, %s, %s, weights %s, x %s", l.E, form_names[form], moe4_act_name(o.act),
                             o.weighting == MOE4_WEIGHT_ON_X ? "on x" : "after down", moe4_dtype_name(o.x_dtype));
                    compare_layers(&c, &o, true, what);
                    free_call(&c);
                    free_layer(&l);
                    free_layer(&s);
                }
        free(r.expert);
    }
    NO_FAILURES();
}

static void test_linears(void **state) {
    (void)state;
    static const size_t tokens[] = {95, 96, 97, 127, 128, 129, 255, 256, 257, 1000};
    int number = 0;
    for (size_t t = 0; t < sizeof tokens / sizeof *tokens; t++)
        for (int m = 0; m < N_MODES; m++)
            for (int rows = 0; rows < 2; rows++, number++) {
                if (number % every) continue;
                size_t K = number % 3 ? 208 : 1040;
                moe4_weight w[2] = {ref_random_weight(MOE4_NVFP4, 200, K), ref_random_weight(MOE4_NVFP4, 37, K)};
                if (number % 2) random_bias(&w[1]);
                moe4_linear_options o = MOE4_LINEAR_OPTIONS_INIT;
                o.act = modes[m];
                o.x_dtype = rows ? MOE4_NVFP4 : number % 4 ? MOE4_BF16 : MOE4_F32;
                o.y_dtype = number / 2 % 2 ? MOE4_BF16 : MOE4_F32;
                struct linear_call c = {w, 2, tokens[t], random_floats(tokens[t] * K), (moe4_scale_layout)(number % 3)};
                char what[96];
                snprintf(what, sizeof what, "linear, %s, x %s, K %zu, T %zu", moe4_act_name(o.act), moe4_dtype_name(o.x_dtype), K,
                         tokens[t]);
                compare_linears(&c, &o, true, what);
                free((void *)c.x);
                free_matrices(w, 2);
            }
    NO_FAILURES();
}

static void grouped_case(int number, const struct routing *r, size_t diagonal_rows, int m, moe4_dtype x_dtype) {
    size_t n = diagonal_rows ? 5 : r->n_experts, K = 208, N = 100, parts = diagonal_rows ? n : 1;
    moe4_weight w[MOST];
    for (size_t i = 0; i < n; i++) {
        w[i] = ref_random_weight(MOE4_NVFP4, N, K);
        if (number % 2 && i != 2) random_bias(&w[i]);
    }
    moe4_grouped_options o = MOE4_GROUPED_OPTIONS_INIT;
    o.act = modes[m];
    o.x_dtype = x_dtype;
    o.y_dtype = number % 3 == 2 ? MOE4_BF16 : MOE4_F32;
    o.y_ld = number % 3 == 1 ? parts * N + 8 : 0;
    o.block_diagonal = diagonal_rows > 0;
    struct grouped_call c = {.w = w, .n_groups = n, .n_rows = diagonal_rows ? diagonal_rows : r->n_slots, .offsets = r->offsets};
    c.x = random_floats(c.n_rows * parts * K);
    c.layout = diagonal_rows ? MOE4_SCALES_LINEAR : (moe4_scale_layout)(number % 3);
    char what[96];
    snprintf(what, sizeof what, "%zu groups, %zu rows, diagonal %d, %s, x %s", n, c.n_rows, o.block_diagonal, moe4_act_name(o.act),
             moe4_dtype_name(x_dtype));
    compare_grouped(&c, &o, true, what);
    free((void *)c.x);
    free_matrices(w, n);
}

static void test_grouped(void **state) {
    (void)state;
    static const size_t diagonal_rows[] = {97, 257, 1000};
    int number = 0;
    for (int n = 0; n < 3; n++) {
        struct routing r = make_routing(COUNTS[n]);
        for (int m = 0; m < N_MODES; m++)
            for (int x = 0; x < 2; x++, number++) {
                if (number % every) continue;
                grouped_case(number, &r, 0, m, x ? MOE4_NVFP4 : MOE4_F32);
                grouped_case(number, &r, diagonal_rows[n], m, x ? MOE4_NVFP4 : MOE4_BF16);
            }
        free(r.expert);
    }
    NO_FAILURES();
}

/* A workspace for n tokens or rows serves fewer. */
static void test_workspaces(void **state) {
    (void)state;
    struct layer l = make_experts(MOST, true);
    moe4_weight wide = ref_random_weight(MOE4_NVFP4, 4000, 64);
    moe4_moe_options o = MOE4_MOE_OPTIONS_INIT;
    moe4_linear_options lo = MOE4_LINEAR_OPTIONS_INIT;
    moe4_grouped_options go = MOE4_GROUPED_OPTIONS_INIT;
    moe4_moe *moe;
    moe4_linear *linear;
    moe4_grouped *grouped;
    o.n_experts = l.E;
    o.top_k = 2;
    lo.y_dtype = go.y_dtype = MOE4_BF16;
    OK(gpu, moe4_moe_create(&moe, gpu, l.expert, &o));
    OK(gpu, moe4_linear_create(&linear, gpu, &wide, 1, &lo));
    OK(gpu, moe4_grouped_create(&grouped, gpu, &wide, 1, &go));
    size_t before[4] = {0};
    for (size_t n = 1; n <= 3000; n++) {
        size_t now[4];
        OK(gpu, moe4_moe_workspace_bytes(moe, &now[0], n));
        OK(gpu, moe4_moe_rows_workspace_bytes(moe, &now[1], n, 0));
        OK(gpu, moe4_linear_workspace_bytes(linear, &now[2], n));
        OK(gpu, moe4_grouped_workspace_bytes(grouped, &now[3], n));
        for (int i = 0; i < 4; i++) {
            EXPECT(now[i] >= before[i], "workspace %d: %zu bytes for %zu, and %zu for %zu\n", i, now[i], n, before[i], n - 1);
            before[i] = now[i];
        }
    }
    moe4_moe_destroy(moe);
    moe4_linear_destroy(linear);
    moe4_grouped_destroy(grouped);
    ref_free_weight(&wide);
    free_layer(&l);
    NO_FAILURES();
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    int status = open_both("test_cuda_many", 0);
    if (status) return status;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_linears),
        cmocka_unit_test(test_grouped),
        cmocka_unit_test(test_workspaces),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    close_both();
    return failed;
}
