/* The inputs that calibration watches, and which matrices of the plan read them. */
#include <stdio.h>
#include <stdlib.h>

#include "quantize/calibration.h"

struct place {
    const void *data;
    struct quantize_item *item;
};

static int by_data(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)((const struct place *)a)->data, y = (uintptr_t)((const struct place *)b)->data;
    return (x > y) - (x < y);
}

struct setup {
    struct quantize_calibration *c;
    struct place *places;
};

static struct quantize_item *item_of(const struct setup *s, const moe4_weight *w) {
    struct place key = {.data = w->data}, *found = bsearch(&key, s->places, s->c->plan->n_items, sizeof key, by_data);
    return found ? found->item : NULL;
}

/* The two mappings of one folder list the same tensors in the same order. */
static moe4_status find_places(struct setup *s) {
    const struct quantize_plan *plan = s->c->plan;
    s->places = lm_calloc(plan->lm, plan->n_items, sizeof *s->places, "calibration");
    if (!s->places) return MOE4_ERROR_MEMORY;
    for (size_t i = 0; i < plan->n_items; i++) {
        moe4_tensor t;
        LM_TRY(plan->lm, moe4_checkpoint_tensor(s->c->model->ckpt, &t, plan->items[i].number));
        s->places[i] = (struct place){t.data, &plan->items[i]};
    }
    qsort(s->places, plan->n_items, sizeof *s->places, by_data);
    return MOE4_OK;
}

static moe4_status set_up_input(const struct setup *s, struct input *in, const moe4_weight *const *weights, size_t n) {
    in->cols = weights[0]->cols;
    in->sum_sq = lm_calloc(s->c->plan->lm, in->cols, sizeof *in->sum_sq, "calibration");
    in->mean_sq = lm_calloc(s->c->plan->lm, in->cols, sizeof *in->mean_sq, "calibration");
    for (size_t i = 0; i < n; i++) in->item[i] = item_of(s, weights[i]);
    return in->sum_sq && in->mean_sq ? MOE4_OK : MOE4_ERROR_MEMORY;
}

static moe4_status set_up_mlp(const struct setup *s, struct mlp *m, size_t layer, int64_t expert) {
    struct lm *lm = s->c->plan->lm;
    moe4_weight down;
    LM_TRY(lm, moe4_checkpoint_expert(s->c->model->ckpt, &m->gate, layer, expert, MOE4_GATE));
    LM_TRY(lm, moe4_checkpoint_expert(s->c->model->ckpt, &m->up, layer, expert, MOE4_UP));
    LM_TRY(lm, moe4_checkpoint_expert(s->c->model->ckpt, &down, layer, expert, MOE4_DOWN));
    LM_TRY(lm, set_up_input(s, &m->x, (const moe4_weight *[]){&m->gate, &m->up}, 2));
    return set_up_input(s, &m->h, (const moe4_weight *[]){&down}, 1);
}

static moe4_status set_up_layer(const struct setup *s, struct layer *l, size_t layer) {
    static const char *const names[] = {"q_proj", "k_proj", "v_proj", "o_proj"};
    struct lm *lm = s->c->plan->lm;
    const moe4_model_info *info = &s->c->model->config.info;
    moe4_weight w[4];
    for (int i = 0; i < 4; i++) {
        char name[160];
        snprintf(name, sizeof name, "model.layers.%zu.self_attn.%s", layer, names[i]);
        LM_TRY(lm, moe4_checkpoint_weight(s->c->model->ckpt, &w[i], name));
    }
    LM_TRY(lm, set_up_input(s, &l->qkv, (const moe4_weight *[]){&w[0], &w[1], &w[2]}, 3));
    LM_TRY(lm, set_up_input(s, &l->o, (const moe4_weight *[]){&w[3]}, 1));

    moe4_layer_kind kind;
    LM_TRY(lm, moe4_checkpoint_layer_kind(s->c->model->ckpt, &kind, layer));
    l->n_routed = kind == MOE4_LAYER_MOE ? info->n_experts : 0;
    l->n_mlps = kind == MOE4_LAYER_MOE ? info->n_experts + (info->n_shared_experts > 0) : 1;
    l->mlps = lm_calloc(lm, l->n_mlps, sizeof *l->mlps, "calibration");
    if (!l->mlps) return MOE4_ERROR_MEMORY;
    for (size_t e = 0; e < l->n_routed; e++) LM_TRY(lm, set_up_mlp(s, &l->mlps[e], layer, (int64_t)e));
    if (l->n_mlps == l->n_routed) return MOE4_OK;
    return set_up_mlp(s, &l->mlps[l->n_routed], layer, kind == MOE4_LAYER_MOE ? MOE4_EXPERT_SHARED : MOE4_EXPERT_DENSE);
}

moe4_status quantize_calibration_set_up(struct quantize_calibration *c) {
    struct lm *lm = c->plan->lm;
    struct setup s = {c, NULL};
    c->n_layers = c->model->config.info.n_layers;
    c->limit = c->model->config.info.swiglu_limit;
    c->layers = lm_calloc(lm, c->n_layers, sizeof *c->layers, "calibration");
    moe4_status status = c->layers ? find_places(&s) : MOE4_ERROR_MEMORY;
    for (size_t i = 0; status == MOE4_OK && i < c->n_layers; i++) status = set_up_layer(&s, &c->layers[i], i);
    free(s.places);
    return status;
}
