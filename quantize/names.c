/* Which tensors are linear layers: by the names that all families share, never by shape alone. */
#include <ctype.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quantize/plan.h"

static const char weight[] = ".weight";
static const char *const linear[] = {"q_proj",    "k_proj",    "v_proj",  "o_proj",    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
                                     "kv_b_proj", "gate_proj", "up_proj", "down_proj", "w1",       "w2",       "w3"};

bool quantize_ends_with(const char *tensor, const char *suffix) {
    size_t n = strlen(tensor), k = strlen(suffix);
    return n > k && strcmp(tensor + n - k, suffix) == 0;
}

size_t quantize_module_length(const char *tensor) {
    return quantize_ends_with(tensor, weight) ? strlen(tensor) - strlen(weight) : 0;
}

/* Towers for images and sound stay as they are, whatever their layers are called. */
static bool in_tower(const char *tensor) {
    return strstr(tensor, "vision") || strstr(tensor, "visual") || strstr(tensor, "audio");
}

/* The number behind "layers."; layers past what config.json counts (multi-token prediction) are no layers of the model. */
static bool in_layer(const char *tensor, size_t n_layers) {
    const char *at = strncmp(tensor, "layers.", 7) == 0 ? tensor : strstr(tensor, ".layers.");
    if (!at) return false;
    at += *at == '.' ? 8 : 7;
    char *end;
    unsigned long long layer = isdigit((unsigned char)*at) ? strtoull(at, &end, 10) : n_layers;
    return layer < n_layers && *end == '.';
}

bool quantize_is_linear(const char *tensor, size_t n_layers) {
    size_t n = quantize_module_length(tensor), begin = n;
    while (begin > 0 && tensor[begin - 1] != '.') begin--;
    if (!n || !in_layer(tensor, n_layers) || in_tower(tensor)) return false;
    for (size_t i = 0; i < sizeof linear / sizeof *linear; i++)
        if (n - begin == strlen(linear[i]) && strncmp(tensor + begin, linear[i], n - begin) == 0) return true;
    return false;
}

bool quantize_partner_name(char partner[static QUANTIZE_NAME_BYTES], const char *tensor) {
    static const char *const pairs[][2] = {{".gate_proj", ".up_proj"}, {".up_proj", ".gate_proj"}, {".w1", ".w3"}, {".w3", ".w1"}};
    size_t n = quantize_module_length(tensor);
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        size_t k = strlen(pairs[i][0]);
        if (n > k && strncmp(tensor + n - k, pairs[i][0], k) == 0)
            return snprintf(partner, QUANTIZE_NAME_BYTES, "%.*s%s%s", (int)(n - k), tensor, pairs[i][1], weight) < QUANTIZE_NAME_BYTES;
    }
    return false;
}

bool quantize_matches(const char *tensor, const char *const *patterns, size_t n_patterns) {
    char module[QUANTIZE_NAME_BYTES];
    size_t n = quantize_module_length(tensor);
    snprintf(module, sizeof module, "%.*s", (int)(n ? n : strlen(tensor)), tensor);
    for (size_t i = 0; i < n_patterns; i++)
        if (fnmatch(patterns[i], module, 0) == 0) return true;
    return false;
}
