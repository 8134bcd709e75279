/* wgmma with A in registers: d[64 x N] += a[64 x 16] . b[16 x N], bf16 in, fp32 out. b is N rows of 64 k (128 bytes) in shared memory,
 * 16-byte chunks swizzled by row % 8; a and d are fragments as in mma.sync m16n8k16, a warp of the group having 16 rows. */
#ifndef MOE4_CUDA_WGMMA_CUH
#define MOE4_CUDA_WGMMA_CUH

#include <stdint.h>

/* Registers 8i .. 8i+7 of d, as text and as operands. */
#define D0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D1 D0 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D2 D1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define D3 D2 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define D4 D3 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define D5 D4 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define D6 D5 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define D7 D6 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define D8 D7 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define D9 D8 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define D10 D9 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define D11 D10 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define D12 D11 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define D13 D12 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define D14 D13 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define D15 D14 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define R(i)                                                                                                            \
    "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3]), "+f"(d[8 * i + 4]), "+f"(d[8 * i + 5]), \
        "+f"(d[8 * i + 6]), "+f"(d[8 * i + 7])
#define R0 R(0)
#define R1 R0, R(1)
#define R2 R1, R(2)
#define R3 R2, R(3)
#define R4 R3, R(4)
#define R5 R4, R(5)
#define R6 R5, R(6)
#define R7 R6, R(7)
#define R8 R7, R(8)
#define R9 R8, R(9)
#define R10 R9, R(10)
#define R11 R10, R(11)
#define R12 R11, R(12)
#define R13 R12, R(13)
#define R14 R13, R(14)
#define R15 R14, R(15)

/* The four registers behind R(i - 1), where N is no multiple of 16. */
#define H(i) "+f"(d[8 * i]), "+f"(d[8 * i + 1]), "+f"(d[8 * i + 2]), "+f"(d[8 * i + 3])

/* One instance: its N, its registers, and the numbers of the operands behind them (a: four, b, accumulate). */
template <int N> struct wgmma;
#define WGMMA_OF(N, TEXT, REGISTERS, A0, A1, A2, A3, B, P)                                                                          \
    template <> struct wgmma<N> {                                                                                                   \
        template <int M> static __device__ __forceinline__ void add(float (&d)[M], const uint32_t *a, uint64_t b, int accumulate) { \
            asm volatile("{\n"                                                                                                      \
                         ".reg .pred p;\n"                                                                                          \
                         "setp.ne.b32 p, %" #P ", 0;\n"                                                                             \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" TEXT "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3   \
                         "}, %" #B ", p, 1, 1, 0;\n"                                                                                \
                         "}"                                                                                                        \
                         : REGISTERS                                                                                                \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                    \
        }                                                                                                                           \
    }
#define COMMA ,
#define WGMMA(N, LAST, A0, A1, A2, A3, B, P) WGMMA_OF(N, D##LAST, R##LAST, A0, A1, A2, A3, B, P)
#define WGMMA_8(N, LAST, I, T0, T1, T2, T3, A0, A1, A2, A3, B, P) \
    WGMMA_OF(N, D##LAST ",%" #T0 ",%" #T1 ",%" #T2 ",%" #T3, R##LAST COMMA H(I), A0, A1, A2, A3, B, P)
WGMMA(16, 0, 8, 9, 10, 11, 12, 13);
WGMMA(32, 1, 16, 17, 18, 19, 20, 21);
WGMMA(48, 2, 24, 25, 26, 27, 28, 29);
WGMMA(64, 3, 32, 33, 34, 35, 36, 37);
WGMMA(80, 4, 40, 41, 42, 43, 44, 45);
WGMMA(96, 5, 48, 49, 50, 51, 52, 53);
WGMMA(112, 6, 56, 57, 58, 59, 60, 61);
WGMMA(128, 7, 64, 65, 66, 67, 68, 69);
WGMMA(144, 8, 72, 73, 74, 75, 76, 77);
WGMMA(160, 9, 80, 81, 82, 83, 84, 85);
WGMMA(176, 10, 88, 89, 90, 91, 92, 93);
WGMMA(192, 11, 96, 97, 98, 99, 100, 101);
WGMMA(208, 12, 104, 105, 106, 107, 108, 109);
WGMMA(224, 13, 112, 113, 114, 115, 116, 117);
WGMMA(240, 14, 120, 121, 122, 123, 124, 125);
WGMMA(256, 15, 128, 129, 130, 131, 132, 133);
WGMMA_8(24, 0, 1, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17);
WGMMA_8(40, 1, 2, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25);
WGMMA_8(56, 2, 3, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33);
WGMMA_8(72, 3, 4, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41);
WGMMA_8(88, 4, 5, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49);
WGMMA_8(104, 5, 6, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57);
WGMMA_8(120, 6, 7, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65);
WGMMA_8(136, 7, 8, 64, 65, 66, 67, 68, 69, 70, 71, 72, 73);
WGMMA_8(152, 8, 9, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81);
WGMMA_8(168, 9, 10, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89);
WGMMA_8(184, 10, 11, 88, 89, 90, 91, 92, 93, 94, 95, 96, 97);
WGMMA_8(200, 11, 12, 96, 97, 98, 99, 100, 101, 102, 103, 104, 105);
WGMMA_8(216, 12, 13, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113);
WGMMA_8(232, 13, 14, 112, 113, 114, 115, 116, 117, 118, 119, 120, 121);
WGMMA_8(248, 14, 15, 120, 121, 122, 123, 124, 125, 126, 127, 128, 129);
#undef WGMMA
#undef WGMMA_8
#undef WGMMA_OF
#undef COMMA
#undef H
#undef R
#undef D0
#undef D1
#undef D2
#undef D3
#undef D4
#undef D5
#undef D6
#undef D7
#undef D8
#undef D9
#undef D10
#undef D11
#undef D12
#undef D13
#undef D14
#undef D15
#undef R0
#undef R1
#undef R2
#undef R3
#undef R4
#undef R5
#undef R6
#undef R7
#undef R8
#undef R9
#undef R10
#undef R11
#undef R12
#undef R13
#undef R14
#undef R15

/* Orders this warp's writes to registers before the wgmma that follow. */
static __device__ __forceinline__ void wgmma_fence(void) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
static __device__ __forceinline__ void wgmma_commit(void) {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Waits until at most N groups are under way. */
template <int N> static __device__ __forceinline__ void wgmma_wait(void) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* 16 k, from 16 q on, of b at a 1024-byte boundary: rows of 128 bytes, eight rows 1024 bytes on. By halves, as only the lower one changes.
 */
static __device__ __forceinline__ uint64_t wgmma_operand(uint32_t b, int q) {
    uint64_t operand;
    asm("mov.b64 %0, {%1, %2};" : "=l"(operand) : "r"((b >> 4) + (1u << 16) + 2u * (uint32_t)q), "n"(1024 >> 4 | 1 << 30));
    return operand;
}

/* A warpgroup takes or gives back registers. */
template <int N> static __device__ __forceinline__ void registers_grow(void) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> static __device__ __forceinline__ void registers_shrink(void) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

#endif
