// Decode attention's parts that several CTAs have a share in: each goes to L2, cut into records of 32 outputs
// with their columns' maxima and sums. No fence and no ticket: a word of a record that is not there yet has
// all bits set. Its reader sets them again, for the next launch. In a step of at most one unit a CTA the warps
// of the CTAs after a sequence's last part fold a record each. In larger steps a CTA folds between its units
// what has come so far, since parts come in their order (decode_order.h): when the last units end, next to
// nothing is left to fold. A CTA awaits CTAs before it only, which run or have run.
// Device only.
#pragma once

#include "backend/cuda/device/decode_fold.cuh"

namespace turbomind::cuda::decode {

// A record: the 32 outputs that lanes of equal lane % 4 hold in a register set [o][n], as [g][i], then
// maximum and sum of the first column and of the second. Records of a unit: [kSteps][pairs].
inline constexpr int kRecordWords = 36;
inline constexpr uint32_t kAbsent = 0xffffffffU;

template <class C>
__device__ __forceinline__ uint32_t* record_of(const Params& p, int unit, int m, int pair) {
  return p.args.records +
         (static_cast<int64_t>(unit * C::kSteps + m) * p.pairs + pair) * kRecordWords;
}
// A word that is never kAbsent, which as a float is one of many NaNs.
__device__ __forceinline__ uint32_t present(float value) {
  return min(__float_as_uint(value), kAbsent - 1);
}
__device__ __forceinline__ void publish_four(uint32_t* words, float x, float y, float z, float w) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"l"(words), "r"(present(x)),
               "r"(present(y)), "r"(present(z)), "r"(present(w))
               : "memory");
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ uint2 load_relaxed_two(const uint32_t* words) {
  uint2 value;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];\n"
               : "=r"(value.x), "=r"(value.y)
               : "l"(words)
               : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_relaxed_four(const uint32_t* words) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(words)
               : "memory");
  return value;
}
__device__ __forceinline__ bool is_absent(const uint4& words) {
  return max(max(words.x, words.y), max(words.z, words.w)) == kAbsent;
}
__device__ __forceinline__ void set_absent_four(uint32_t* words) {
  *reinterpret_cast<uint4*>(words) = {kAbsent, kAbsent, kAbsent, kAbsent};
}
__device__ __forceinline__ float4 as_floats(const uint4& words) {
  return {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
          __uint_as_float(words.w)};
}

// `singly`: records are folded one by one, each with the maxima and sums; else those of a warp have them once.
template <class C>
__device__ __forceinline__ void publish_part(const Out<C>& out, const float2 (&largest)[C::kN],
                                             const float2 (&sum)[C::kN], const Params& p, int index,
                                             bool singly, int warp, int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    const int pair = n * 4 + lane % 4;
    if (pair >= p.pairs) continue;
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
      const int m = warp + kWarps * o;
      if (!C::owns(warp, o)) break;
      uint32_t* record = record_of<C>(p, index, m, pair);
      const float(&x)[4] = out[o][n];
      publish_four(record + lane / 4 * 4, x[0], x[1], x[2], x[3]);
      if (lane < 4 && (o == 0 || singly)) {
        publish_four(record + 32, largest[n].x, sum[n].x, largest[n].y, sum[n].y);
      }
    }
  }
}

// Which parts of a sequence and head a CTA folds that shares it with others: [next, end), onto what it has.
struct PartFold {
  int first = 0;  // unit of the step: part 0
  int next = -1;
  int end = -1;
  // Stands for all parts up to this one, which another CTA has folded; -1: none has.
  int before = -1;
  bool hands_over = false;  // when all are folded
  // The unit in whose place a part is, or what others have folded: in that of part 0, which they folded without
  // sending it to L2.
  __device__ __forceinline__ int place(int part) const {
    return part == before ? first : first + part;
  }
};
// `none`: nothing, the CTA shares no head.
__device__ __forceinline__ PartFold part_fold(const PartOrder& order, int first, bool none,
                                              int parts) {
  PartFold fold;
  if (none) return fold;
  fold.first = first;
  const int early = order.early_parts();
  if (order.is_last) {
    fold.before = early - 1;
    fold.next = max(fold.before, 0);
    fold.end = parts;
  } else if (order.is_folder && early > 0) {
    fold.next = 0;
    fold.end = early;
    fold.hands_over = true;
  }
  return fold;
}

// Parts that a CTA folds next, each warp its own outputs, as they are in L2 or not yet.
template <class C, int kBatch>
struct Arrivals {
  uint4 words[kBatch][C::kOwn][C::kN];
  uint4 max_sum[kBatch][C::kN];
};
// Asks L2 for the parts before `end`.
template <class C, int kBatch>
__device__ __forceinline__ void request_parts(Arrivals<C, kBatch>& arrivals, const Params& p,
                                              const PartFold& fold, int end, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      const int pair = n * 4 + lane % 4;
      const bool has = fold.next + i < end && pair < p.pairs;
      const uint32_t* record = record_of<C>(p, fold.place(fold.next + i), warp, pair);
      arrivals.max_sum[i][n] = has ? load_relaxed_four(record + 32) : uint4{};
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        arrivals.words[i][o][n] =
            has && C::owns(warp, o)
                ? load_relaxed_four(record + o * kWarps * p.pairs * kRecordWords + lane / 4 * 4)
                : uint4{};
      }
    }
  }
}

// Folds what was asked for, as far as it is there, onto what comes before it: how many parts, kBatch at
// most.
template <class C, int kBatch>
__device__ __forceinline__ int fold_arrived(Total<C>& total, const Arrivals<C, kBatch>& arrivals,
                                            const Params& p, const PartFold& fold, int end,
                                            int warp, int lane) {
  const auto& words = arrivals.words;
  const auto& max_sum = arrivals.max_sum;
  const int next = fold.next;
  int folded = 0;
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (next + i >= end) break;
    bool absent = false;
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      absent = absent || is_absent(max_sum[i][n]);
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) absent = absent || is_absent(words[i][o][n]);
    }
    if (__any_sync(~0U, absent)) break;
    __syncwarp();
    Out<C> out;
    float2 largest[C::kN];
    float2 sum[C::kN];
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      const float4 x = as_floats(max_sum[i][n]);
      largest[n] = {x.x, x.z};
      sum[n] = {x.y, x.w};
      const int pair = n * 4 + lane % 4;
      uint32_t* record = record_of<C>(p, fold.place(next + i), warp, pair);
      if (lane < 4 && pair < p.pairs) set_absent_four(record + 32);
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        const float4 y = as_floats(words[i][o][n]);
        out[o][n][0] = y.x;
        out[o][n][1] = y.y;
        out[o][n][2] = y.z;
        out[o][n][3] = y.w;
        if (C::owns(warp, o) && pair < p.pairs) {
          set_absent_four(record + o * kWarps * p.pairs * kRecordWords + lane / 4 * 4);
        }
      }
    }
    if (next + i == fold.before) {  // as it is: folded onto nothing, a zero could lose its sign
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        total.largest[n] = largest[n];
        total.sum[n] = sum[n];
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
#pragma unroll
          for (int k = 0; k < 4; ++k) total.out[o][n][k] = out[o][n][k];
        }
      }
    } else {
      fold_part_into<C>(total, out, largest, sum, p.scale_log2);
    }
    ++folded;
  }
  return folded;
}

// Folds one record of all parts of a sequence, units `first` and on, a word a lane.
template <class C>
__device__ __forceinline__ void fold_record(const Params& p, const Unit& unit, int first, int m,
                                            int pair, int lane) {
  constexpr int kBatch = 16;  // parts; lane: maximum and sum of part lane / 2, column lane % 2
  const int64_t stride = static_cast<int64_t>(C::kSteps) * p.pairs * kRecordWords;
  uint32_t* record = record_of<C>(p, first, m, pair);
  float total = 0.0F;
  float sum = 0.0F;
  float largest = -INFINITY;
#pragma unroll 1
  for (int begin = 0; begin < unit.parts; begin += kBatch) {
    const int count = min(kBatch, unit.parts - begin);
    uint32_t* words = record + begin * stride + lane;
    uint32_t* max_sum = record + (begin + min(lane / 2, count - 1)) * stride + 32 + lane % 2 * 2;
    uint32_t word[kBatch];
    uint2 own;
    bool absent = true;
    while (__any_sync(~0U, absent)) {
      own = load_relaxed_two(max_sum);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        word[i] = i < count ? load_relaxed(words + i * stride) : 0;
      }
      absent = own.x == kAbsent || own.y == kAbsent;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) absent = absent || word[i] == kAbsent;
    }
    __syncwarp();
    if (lane / 2 < count) max_sum[0] = max_sum[1] = kAbsent;
    const float own_max = lane / 2 < count ? __uint_as_float(own.x) : -INFINITY;
    float after = own_max;
#pragma unroll
    for (int offset = 2; offset < 32; offset *= 2) {
      const float other = __shfl_up_sync(~0U, after, offset);
      if (lane >= offset) after = fmaxf(after, other);
    }
    after = fmaxf(largest, after);
    float before = __shfl_up_sync(~0U, after, 2);
    if (lane < 2) before = largest;
    largest = __shfl_sync(~0U, after, 30 + lane % 2);
    const FoldFactors factors = fold_factors(before, own_max, p.scale_log2);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i >= count) break;
      words[i * stride] = kAbsent;
      const int from = 2 * i + lane % 2;
      const FoldFactors f{__shfl_sync(~0U, factors.before, from),
                          __shfl_sync(~0U, factors.part, from)};
      sum = fold(sum, __uint_as_float(__shfl_sync(~0U, own.y, from)), f);
      total = fold(total, __uint_as_float(word[i]), f);
    }
  }
  const int column = pair * 2 + lane % 2;
  if (column >= unit.columns) return;
  output_row<C>(p, unit, column)[m * 16 + lane / 4 + lane % 4 / 2 * 8] =
      from_float<typename C::T>(total * inverse_of(sum));
}

// A CTA's share of the fold; `unit`: its own. The CTAs of a sequence's parts, and
// where there is room a second CTA of each for that alone, fold what lies before them; those past all units
// the last.
template <class C>
__device__ __forceinline__ FoldPlan plan_fold(const Params& p, const Run& run, const Unit& unit) {
  const bool has_unit = run.begin < run.end;
  const bool twins = 2 * run.units + kFolders <= static_cast<int>(gridDim.x);
  const int past = static_cast<int>(blockIdx.x) - run.units;
  const int twin = past - kFolders;
  FoldPlan plan;
  if (has_unit || (twins && twin >= 0 && twin < run.units)) {
    const int index = has_unit ? run.begin : twin;
    const Unit own = has_unit ? unit : find_unit<C>(p, index);
    plan.end = index - own.part;
    plan.folder = own.part + (has_unit ? 0 : own.parts);
    plan.folders = twins ? 2 * own.parts : own.parts;
  } else {
    plan.end = run.units;
    plan.folder = past;
    plan.folders = twins ? kFolders : static_cast<int>(gridDim.x) - run.units;
  }
  const bool folds = plan.end > 0 && plan.folder < plan.folders;
  plan.unit = folds ? find_unit<C>(p, plan.end - 1) : Unit{};
  return plan;
}

template <class C>
__device__ __forceinline__ void fold_records(const Params& p, const FoldPlan& plan, int warp,
                                             int lane) {
  const Unit& unit = plan.unit;
  if (unit.sequence < 0 || unit.parts == 1) return;
#pragma unroll 1
  for (int i = warp * plan.folders + plan.folder; i < C::kSteps * p.pairs;
       i += kWarps * plan.folders) {
    fold_record<C>(p, unit, plan.end - unit.parts, i / p.pairs, i % p.pairs, lane);
  }
}

}  // namespace turbomind::cuda::decode
