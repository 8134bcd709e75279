/* Bits are promised (docs/numerics.md), so a product and a sum are rounded each on its own unless the source says fma: what compilers do
 * by default differs, and on a CPU with FMA it shows. The build passes -ffp-contract=off; this is for sources compiled without it. It comes
 * before any header of intrinsics, which are inline functions. GCC has no STDC FP_CONTRACT, clang no `optimize`. */
#ifndef MOE4_CONTRACT_H
#define MOE4_CONTRACT_H

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC optimize("fp-contract=off")
#endif

#endif
