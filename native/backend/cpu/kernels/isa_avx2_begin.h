// From here to isa_end.h functions are compiled for AVX2 + FMA + F16C. Include after every other
// header: inline code of the standard library must keep the baseline instruction set, or the linker
// might choose its AVX2 copy for a machine without it. No include guard: it is a pair of brackets.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
