/* Checks the kernels of the CUDA part alone, stage by stage, against plain fp32/fp64 loops on the host:
 * packed weights and rounded activations bit by bit, products within the bound of docs/numerics.md, the sm_90 kernels bit by bit
 * against the portable ones, every run twice. Exits 77 (skipped) where there is no GPU.
 *
 *   check_cuda [--quick]     one line per case; the last line counts
 *   check_cuda --least       each kernel a few times on the smallest shapes, for tools under which it is slow */
#define MOE4_NO_CALLS /* divide as the prefill kernel has it */
#include "check_forward.cuh"

/* Rows of rounded activations against the contract. */
static int wrong_row(const __nv_bfloat16 *got, float got_factor, const float *x, int n, int padded, moe4_act act, float input_scale,
                     float batch_amax) {
    std::vector<float> want(padded, 0.f);
    float decode = 1.f;
    if (act == MOE4_ACT_W4A16) {
        for (int i = 0; i < n; i++) want[i] = bf16_round(x[i]);
    } else {
        float amax = batch_amax;
        if (act == MOE4_ACT_TOKEN)
            for (int i = 0; i < n; i++) amax = fmaxf(amax, fabsf(x[i]));
        volatile float S = act == MOE4_ACT_STATIC ? 1.f / input_scale : encode_host(amax);
        decode = act == MOE4_ACT_STATIC ? input_scale : 1.f / S;
        for (int i = 0; i < n; i += 16) activation_block_host(&want[i], x + i, S);
    }
    int wrong = got_factor != decode;
    for (int i = 0; i < padded; i++) wrong += __bfloat162float(got[i]) != want[i];
    return wrong;
}

static void compare(const shape_case &c, const moe4_layer_run &r, const host_layer &l, const outputs &got, const std::vector<float> &x,
                    const std::vector<int> &local, const std::vector<float> &weights) {
    int slots = c.T * c.k, hk = r.w.hidden_units * 64, ik = r.w.intermediate_units * 64;
    std::vector<int> order;
    for (int e = 0; e < c.n; e++)
        for (int s = 0; s < slots; s++)
            if (local[s] == e) order.push_back(s);
    check(got.state.n_slots == (int)order.size(), c.name, "slots", got.state.n_slots, (double)order.size());
    check(std::vector<int>(got.slots.begin(), got.slots.begin() + order.size()) == order, c.name, "order of slots", 0, 0);

    bool wide = r.act != MOE4_ACT_W4A16;
    float x_amax = 0, h_amax = 0;
    if (r.act == MOE4_ACT_TENSOR) {
        for (float v : x) x_amax = fmaxf(x_amax, fabsf(v));
        for (size_t i = 0; i < order.size() * ik; i++) h_amax = fmaxf(h_amax, fabsf(got.h_wide[i]));
    }
    int wrong_x = 0, wrong_h = 0;
    double worst_h = 0, worst_o = 0, worst_y = 0;
    for (size_t p = 0; p < order.size(); p++) {
        int s = order[p], e = local[s], t = s / c.k, row = r.act == MOE4_ACT_STATIC ? s : t;
        wrong_x += wrong_row(&got.x[(size_t)row * hk], wide ? got.x_factor[row] : 1.f, &x[(size_t)t * c.hidden], c.hidden, hk, r.act,
                             l.scale_x[e], x_amax);
        if (wide)
            wrong_h += wrong_row(&got.h[p * ik], got.h_factor[p], &got.h_wide[p * ik], c.intermediate, ik, r.act, l.scale_h[e], h_amax);
        /* spot columns against fp64 on the same operands */
        double xf = wide ? got.x_factor[row] : 1, hf = wide ? got.h_factor[p] : 1;
        for (int j = (int)(p % 7); j < c.intermediate; j += 1 + c.intermediate / 23) {
            double g = 0, u = 0, ga = 0, ua = 0;
            for (int k = 0; k < c.hidden; k++) {
                double xv = __bfloat162float(got.x[(size_t)row * hk + k]), gv = xv * l.gate[e].at(j, k), uv = xv * l.up[e].at(j, k);
                g += gv, ga += fabs(gv), u += uv, ua += fabs(uv);
            }
            double ag = l.alpha_gate[e] / 256 * xf, au = l.alpha_up[e] / 256 * xf, bound = (c.hidden + 16) * ldexp(1, -23);
            double gd = g * ag, ud = u * au;
            if (r.limit > 0) gd = fmin(gd, r.limit), ud = fmin(fmax(ud, -r.limit), r.limit);
            double h = gd / (1 + exp(-gd)) * ud;
            /* h moves by |dh/dg| <= 1.1 |u| and |dh/du| <= |g| with the products' bounds, then some ulps, then the rounding to bf16 */
            double tol =
                1.1 * fabs(ud) * ga * fabs(ag) * bound + fabs(gd) * ua * fabs(au) * bound + fabs(h) * (wide ? 1e-6 : 0.00391) + 1e-30;
            double v = wide ? got.h_wide[p * ik + j] : __bfloat162float(got.h[p * ik + j]);
            worst_h = fmax(worst_h, fabs(v - h) / tol);
            if (!(fabs(v - h) <= tol)) worst_h = fmax(worst_h, 1e9);
        }
        for (int j = (int)(p % 5); j < c.hidden; j += 1 + c.hidden / 23) {
            double o = 0, oa = 0;
            for (int k = 0; k < c.intermediate; k++) {
                double v = __bfloat162float(got.h[p * ik + k]) * l.down[e].at(j, k);
                o += v, oa += fabs(v);
            }
            double a = l.alpha_down[e] / 256 * hf, tol = fabs(a) * oa * (c.intermediate + 16) * ldexp(1, -23) + 1e-30;
            double v = got.o[(size_t)s * c.hidden + j];
            worst_o = fmax(worst_o, fabs(v - o * a) <= tol ? fabs(v - o * a) / tol : 1e9);
        }
    }
    for (int t = 0; t < c.T; t++)
        for (int j = 0; j < c.hidden; j += 3) {
            float y = 0;
            double a = 0;
            for (int k = 0; k < c.k; k++)
                if (local[t * c.k + k] >= 0) {
                    float v = weights[t * c.k + k] * got.o[(size_t)(t * c.k + k) * c.hidden + j];
                    y += v, a += fabs(v);
                }
            double d = fabs(got.y[(size_t)t * c.hidden + j] - y), tol = a * 1e-6;
            worst_y = fmax(worst_y, d <= tol ? 0 : 1e9);
        }
    check(wrong_x == 0, c.name, "rounded x that differs", wrong_x, 0);
    check(wrong_h == 0, c.name, "rounded h that differs", wrong_h, 0);
    check(worst_h <= 1, c.name, "h, error over bound", worst_h, 1);
    check(worst_o <= 1, c.name, "o, error over bound", worst_o, 1);
    check(worst_y <= 1, c.name, "y", worst_y, 1);
    if (r.tile_columns == 8 || r.prefill_from)
        printf("%-22s %-6s columns %2d: h %.2f o %.2f of the bound; %d slots, %d tiles, %d of prefill\n", c.name,
               r.act == MOE4_ACT_W4A16    ? "w4a16"
               : r.act == MOE4_ACT_STATIC ? "static"
               : r.act == MOE4_ACT_TENSOR ? "tensor"
                                          : "token",
               r.tile_columns, worst_h, worst_o, got.state.n_slots, got.state.n_tiles, r.prefill_from ? got.state.n_prefill_tiles : 0);
}

/* Slots per expert around the widths of tiles. */
static const int edge_slots[] = {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 1000};
enum { N_EDGES = sizeof edge_slots / sizeof *edge_slots, EDGE_TOKENS = 2777 };

static int edge_expert(int token) {
    int e = 0;
    while (token >= edge_slots[e]) token -= edge_slots[e++];
    return e;
}

/* Experts with many slots by the prefill kernel, the others by decode: against fp64, twice the same bits, and the first half of the
 * tokens alone (in mode tensor it has other scales; elsewhere every expert's sums keep their order where all take one kernel). */
static void prefill_checks(const shape_case &c, moe4_layer_run r, const host_layer &l, const std::vector<float> &x,
                           const std::vector<int> &local, const std::vector<float> &weights, const float *d_weights) {
    for (int i = 0; i < 6; i++) {
        static const int widths[] = {80, 192, 256};
        int columns = widths[i / 2], from = i % 2 ? 20 : 1;
        if (least && (i % 2 == 0) != (columns == 256)) continue; /* all by prefill, or mixed */
        r.prefill_from = from;
        r.prefill_columns = columns;
        r.x_is_kept = columns == 192;
        outputs a = forward(r, true, d_weights), b = forward(r, true, d_weights);
        compare(c, r, l, a, x, local, weights);
        check(same(a.y, b.y), c.name, "y of prefill, repeated", from, 0);
        if (from == 1 && !r.x_is_kept) { /* the same by parts */
            moe4_layer_run parts = r;
            size_t slots = (size_t)c.T * c.k;
            parts.n_windows = slots < 64 ? 1 : columns == 80 ? 3 : 2;
            parts.window_slots = (int)((slots / parts.n_windows + 16) & ~(size_t)15);
            parts.n_slices = columns == 80 ? 1 : 3;
            outputs p = forward(parts, true, d_weights);
            check(same(a.y, p.y), c.name, "y by windows and slices", columns, 0);
        }
        int tiles = 0;
        for (int e = 0; e < c.n; e++)
            if (a.expert_slots[e] >= from) tiles += (a.expert_slots[e] + r.prefill_columns - 1) / r.prefill_columns;
        check(a.state.n_prefill_tiles == tiles, c.name, "prefill tiles", a.state.n_prefill_tiles, tiles);
        if (from > 1 || r.act == MOE4_ACT_TENSOR || c.T < 2) continue;
        moe4_layer_run half = r;
        half.n_tokens = c.T / 2;
        outputs h = forward(half, true, d_weights);
        check(memcmp(h.y.data(), a.y.data(), h.y.size() * sizeof(float)) == 0, c.name, "y of half the batch", from, 0);
    }
}

static void run_case(const shape_case &c, bool sm90) {
    host_layer l;
    moe4_layer_run r = {};
    r.w = make_layer(c, &l);
    r.n_tokens = c.T;
    r.top_k = c.k;
    r.first_expert = 3;
    r.ids_are_64bit = c.routing == 3;
    std::vector<int> local(c.T * c.k);
    std::vector<int32_t> ids32;
    std::vector<int64_t> ids64;
    for (int t = 0; t < c.T; t++)
        for (int k = 0; k < c.k; k++) {
            int e = c.routing == 1 ? 0 : c.routing == 4 ? edge_expert(t) : (int)((rnd() + k) % c.n);
            int64_t id = 3 + e;
            if (c.routing >= 2 && rnd() % 4 == 0) id = rnd() % 2 ? -1 : rnd() % 2 ? 3 + c.n : 2;
            if (c.routing == 3 && rnd() % 8 == 0) id = rnd() % 2 ? INT64_MIN : (1ll << 32) + 3;
            local[t * c.k + k] = id >= 3 && id < 3 + c.n ? (int)(id - 3) : -1;
            ids32.push_back((int32_t)id);
            ids64.push_back(id);
        }
    r.ids = c.routing == 3 ? (void *)to_device(ids64) : (void *)to_device(ids32);
    std::vector<float> x((size_t)c.T * c.hidden), weights(c.T * c.k);
    for (auto &v : x) v = bf16_round(rnd_normal());
    for (auto &v : weights) v = .1f + (float)(rnd() % 100) / 100.f;
    std::vector<__nv_bfloat16> xb(x.size());
    for (size_t i = 0; i < x.size(); i++) xb[i] = __float2bfloat16(x[i]);
    float *d_weights = to_device(weights), *x32 = to_device(x);
    __nv_bfloat16 *x16 = to_device(xb);
    const moe4_act acts[] = {MOE4_ACT_W4A16, MOE4_ACT_TOKEN, MOE4_ACT_STATIC, MOE4_ACT_TENSOR};
    for (moe4_act act : acts)
        for (int columns = 8; columns <= 32; columns += 8) {
            if (least && (columns != 16 || act == MOE4_ACT_STATIC)) continue;
            r.act = act;
            r.alpha = 1.f;
            r.limit = act == MOE4_ACT_TOKEN ? 2.f : 0.f;
            r.tile_columns = columns;
            r.x_in = columns == 8 ? (void *)x32 : (void *)x16;
            r.x_dtype = columns == 8 ? MOE4_F32 : MOE4_BF16;
            r.x_in_ld = (size_t)c.hidden;
            outputs a = forward(r, false, d_weights);
            compare(c, r, l, a, x, local, weights);
            for (int again = 0; sm90 && columns <= 24 && again < 2; again++) {
                outputs b = forward(r, true, d_weights);
                check(same(a.y, b.y), c.name, "y of sm_90 against portable", again, columns);
                size_t n = (size_t)a.state.n_slots * r.w.intermediate_units * 64;
                check(memcmp(a.h.data(), b.h.data(), n * 2) == 0, c.name, "h of sm_90 against portable", again, columns);
            }
            if (sm90 && columns == 16) prefill_checks(c, r, l, x, local, weights, d_weights);
        }
}

/* divide by each positive fp32 number, or by every step-th. */
static __global__ void divide_kernel(unsigned long long *n_wrong, uint32_t step) {
    unsigned long long wrong = 0;
    for (uint64_t i = 1 + (blockIdx.x * (uint64_t)blockDim.x + threadIdx.x) * step; i < 0x7F800000u;
         i += (uint64_t)gridDim.x * blockDim.x * step) {
        float b = __uint_as_float((uint32_t)i);
        wrong += divide(1.f, b) != __fdiv_rn(1.f, b);
        wrong += divide(2688.f, b) != __fdiv_rn(2688.f, b);
    }
    if (wrong) atomicAdd(n_wrong, wrong);
}

static void divide_checks(uint32_t step) {
    unsigned long long *n_wrong = poisoned<unsigned long long>(1);
    CUDA(cudaMemset(n_wrong, 0, sizeof *n_wrong));
    int blocks = step == 1 ? 2048 : 8;
    divide_kernel<<<blocks, 256>>>(n_wrong, step);
    CUDA(cudaGetLastError());
    unsigned long long wrong = to_host(n_wrong, 1)[0];
    check(wrong == 0, "divide", "quotients that are not the nearest", (double)wrong, 0);
    CUDA(cudaFree(n_wrong));
}

int main(int argc, char **argv) {
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0;
    least = argc > 1 && strcmp(argv[1], "--least") == 0;
    cudaDeviceProp device;
    if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
        printf("check_cuda: skipped, no CUDA device\n");
        return 77;
    }
    bool sm90 = device.major == 9;
    printf("check_cuda: %s, compute capability %d.%d\n", device.name, device.major, device.minor);
    const shape_case cases[] = {
        {"tiny", 16, 16, 1, 1, 1, 0, false},
        {"one token", 512, 256, 4, 1, 2, 0, false},
        {"padded k and n", 208, 112, 3, 5, 2, 0, true},
        {"long k", 2048, 128, 2, 3, 1, 0, false},
        {"skipped slots", 256, 192, 6, 33, 3, 2, false},
        {"i64 ids", 128, 64, 5, 40, 4, 3, false},
        {"one hot expert", 320, 96, 4, 70, 2, 1, true},
        {"many experts", 64, 32, 300, 64, 6, 0, false},
        {"all scales", 1024, 512, 2, 9, 2, 0, true},
        {"24 slots an expert", 192, 336, 2, 24, 1, 1, false},
        {"25 slots an expert", 1168, 80, 2, 25, 1, 1, false},
        {"17 slots an expert", 1104, 1088, 2, 17, 1, 1, false},
        {"512 experts", 64, 48, 512, 130, 8, 0, false},
        {"h of more than 2048", 48, 2192, 2, 90, 1, 1, false},
        {"x of more than 8192", 8272, 48, 2, 65, 2, 0, false},
        {"2048 experts", 64, 16, 2048, 130, 8, 0, false},
        {"edges of tiles", 272, 144, N_EDGES, EDGE_TOKENS, 1, 4, false},
    };
    static const int slots[] = {1, 7, 8, 9, 15, 16, 23}; /* of the one expert that is hit; the cases above have 17, 24 and 25 */
    divide_checks(quick || least ? 1000003 : 1);
    if (least) run_case({"least", 80, 48, 2, 40, 1, 0, false}, sm90);
    for (int i = 0; i < 7 && !least; i++) run_case({"slots per expert", 80, 48, 3, slots[i], 1, 1, false}, sm90);
    int n = least ? 0 : quick ? 4 : (int)(sizeof cases / sizeof *cases);
    for (int i = 0; i < n; i++) run_case(cases[i], sm90);
    printf("check_cuda: %d checks, %d failed\n", n_checks, n_failed);
    return n_failed != 0;
}
