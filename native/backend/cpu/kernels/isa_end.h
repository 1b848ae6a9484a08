// Closes the bracket opened by isa_{avx2,avx512,amx}_begin.h.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
