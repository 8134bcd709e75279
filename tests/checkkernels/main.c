#include "checkkernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- guard pages ---- */

enum { MAX_BUFFERS = 320, PATTERN = 0xa5 };

static struct buffer {
    uint8_t *map, *data;
    size_t map_bytes, bytes;
} buffers[MAX_BUFFERS];
static size_t n_buffers;

static void die(const char *what) {
    perror(what);
    exit(2);
}

void *guarded(size_t bytes, enum side side) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (bytes + page) / page * page;
    struct buffer *b = &buffers[n_buffers++];
    if (n_buffers > MAX_BUFFERS) die("too many buffers");
    *b = (struct buffer){.map_bytes = inner + 2 * page, .bytes = bytes};
    b->map = mmap(NULL, b->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (b->map == MAP_FAILED || mprotect(b->map + page, inner, PROT_READ | PROT_WRITE) != 0) die("guard pages");
    memset(b->map + page, PATTERN, inner);
    b->data = b->map + page + (side == AT_END ? inner - bytes : 0);
    return b->data;
}

bool guarded_release(void) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    bool clean = true;
    for (size_t i = 0; i < n_buffers; i++) {
        struct buffer *b = &buffers[i];
        for (uint8_t *at = b->map + page; at < b->map + b->map_bytes - page; at++)
            if ((at < b->data || at >= b->data + b->bytes) && *at != PATTERN) clean = false;
        munmap(b->map, b->map_bytes);
    }
    n_buffers = 0;
    return clean;
}

/* ---- lines ---- */

void check_line(struct check *c, const char *kernel, const char *what, bool ok) {
    printf("%-8s %-14s %-40s %s\n", c->k->isa, kernel, what, ok ? "ok" : "FAILED");
    c->n_failed += !ok;
}

bool same_bytes(const void *a, const void *b, size_t bytes) {
    return bytes == 0 || memcmp(a, b, bytes) == 0;
}

int main(int argc, char **argv) {
    struct moe4_kernels kernels[32] = {{0}};
    setvbuf(stdout, NULL, _IOLBF, 0); /* after a fault, the last line says where */
    uint32_t have = moe4_cpu_isas();
    size_t n = 0, n_failed = 0;
    for (uint32_t bit = 1; bit && bit <= have; bit <<= 1)
        if (have & bit) {
            moe4_kernels_init(&kernels[n], have & (2 * bit - 1));
            n += n == 0 || strcmp(kernels[n].isa, kernels[n - 1].isa) != 0; /* a bit may have no kernels of its own */
        }
    if (argc == 2 && strcmp(argv[1], "--bench") == 0) {
        bench(kernels, n);
        return 0;
    }
    if (argc != 1) {
        fprintf(stderr, "usage: checkkernels [--bench]\n");
        return 2;
    }
    for (size_t i = 0; i < n; i++) {
        struct check c = {.k = &kernels[i], .scalar = &kernels[0], .random = 1};
        check_codec(&c);
        check_gemm(&c);
        check_pack(&c);
        n_failed += c.n_failed;
    }
    printf("%zu failed\n", n_failed);
    return n_failed ? 1 : 0;
}
