/* What this CPU has, and how many of its threads this process may use. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "pool.h"

#if defined(__x86_64__)
static bool has_f16c(void) { /* __builtin_cpu_supports knows it in GCC alone */
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

uint32_t moe4_cpu_isas(void) {
    uint32_t isas = MOE4_ISA_SCALAR;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) isas |= MOE4_ISA_AVX2;
    if ((isas & MOE4_ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni"))
        isas |= MOE4_ISA_AVX512VNNI;
    if ((isas & MOE4_ISA_AVX512VNNI) && __builtin_cpu_supports("avx512bf16")) isas |= MOE4_ISA_AVX512BF16;
#elif defined(__aarch64__)
    isas |= MOE4_ISA_NEON;
#if defined(MOE4_NEON_DOT)
    enum { ASIMDDP = 1 << 20, I8MM = 1 << 13 }; /* Linux's bits, which not every C library names */
    if (getauxval(AT_HWCAP) & ASIMDDP) isas |= MOE4_ISA_NEONDOT;
    if ((isas & MOE4_ISA_NEONDOT) && (getauxval(AT_HWCAP2) & I8MM)) isas |= MOE4_ISA_NEONI8MM;
#endif
#endif
    return isas;
}

static size_t affinity_cpus(void) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return (size_t)CPU_COUNT(&set);
    long n = sysconf(_SC_NPROCESSORS_ONLN); /* more CPUs than a cpu_set_t holds */
    return n > 0 ? (size_t)n : 1;
}

/* CPUs from "<quota> <period>" microseconds, rounded up; 0 when there is no limit. */
static size_t quota_cpus(const char *quota_path, const char *period_path) {
    long long quota = -1, period = 0;
    FILE *f = fopen(quota_path, "r");
    if (!f) return 0;
    int n = fscanf(f, "%lld %lld", &quota, &period); /* "max 100000" stops at once: no limit */
    fclose(f);
    if (n == 1 && period_path && (f = fopen(period_path, "r"))) {
        if (fscanf(f, "%lld", &period) != 1) period = 0;
        fclose(f);
    }
    return quota > 0 && period > 0 ? (size_t)((quota + period - 1) / period) : 0;
}

/* The tightest limit from this process's cgroup (version 2) up to the root, or version 1's. */
static size_t cgroup_cpus(void) {
    size_t least = 0;
    char line[1024], path[1152];
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (strncmp(line, "0::", 3) != 0) continue;
        char *group = line + 3;
        group[strcspn(group, "\n")] = '\0';
        for (char *slash;; *slash = '\0') {
            snprintf(path, sizeof path, "/sys/fs/cgroup%s/cpu.max", strcmp(group, "/") == 0 ? "" : group);
            size_t n = quota_cpus(path, NULL);
            if (n && (!least || n < least)) least = n;
            if (!(slash = strrchr(group, '/'))) break;
        }
    }
    if (f) fclose(f);
    if (!least) least = quota_cpus("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    return least;
}

size_t moe4_cpu_threads(void) {
    size_t n = affinity_cpus(), limit = cgroup_cpus();
    if (limit && limit < n) n = limit;
    if (n > MOE4_MAX_THREADS) n = MOE4_MAX_THREADS;
    return n ? n : 1;
}
