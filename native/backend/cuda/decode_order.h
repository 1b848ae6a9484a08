// Which parts of a sequence and head (a chain) the CTAs of a decode step compute and fold, and when. The step's
// units, the chains' parts one chain after the other, are cut into runs of neighbours, a run a CTA, equal but
// for one unit. A CTA does the last chain of its run first, and the parts of a chain go to its CTAs in the
// order in which they get to them: so all parts come to be known from the first to the last, evenly over the
// step, and are folded meanwhile, by one CTA that computes some of them itself. Until the chain's last CTA
// gets to it this is the one before that; it then hands over what it has folded. So a CTA folds no chain but
// that which it computes, and awaits CTAs before it only. For host and device; 32 bits hold units times CTAs.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define TM_HOST_DEVICE inline
#endif

namespace turbomind::cuda::decode {

// A run's first unit; that of `ctas` is the end of all.
TM_HOST_DEVICE int run_begin(int units, int ctas, int cta) {
  return static_cast<int>(static_cast<uint32_t>(units) * static_cast<uint32_t>(cta) /
                          static_cast<uint32_t>(ctas));
}
// The CTA in whose run a unit lies.
TM_HOST_DEVICE int cta_of(int units, int ctas, int unit) {
  return static_cast<int>(((static_cast<uint32_t>(unit) + 1) * static_cast<uint32_t>(ctas) - 1) /
                          static_cast<uint32_t>(units));
}

// The parts of a chain that one CTA computes. Time: units that a CTA has done before.
struct PartOrder {
  int first;        // parts of the chain's first CTA, which does them at times 0, 1, ...
  int later;        // 1: this CTA is a later one, 0: that one
  int between;      // CTAs that do nothing but this chain, at all times
  int before;       // of them, those before this CTA
  int before_last;  // of these, those that have one unit more than the shortest run
  int shortest;     // units of the step's shortest runs
  int last_begin;   // when the chain's last CTA gets to it
  int last_end;     // and when it has done with it
  bool is_last;     // this CTA is that one: it folds what is computed from then on
  bool is_folder;   // this CTA is the one before: it folds what is computed until then

  // The part that this CTA computes at a time: as many as are computed at earlier times, or at the same
  // time by the CTA that folds them or, if it does not, by those before it.
  TM_HOST_DEVICE int part(int time) const {
    const bool early = time < last_begin;
    const bool folds = early ? is_folder : is_last;
    const int at_once = folds ? time : time + later;
    const int of_first = at_once < first ? at_once : first;
    const int of_others = (time < shortest ? before : before_last) + (time < last_end ? 1 : 0);
    return of_first + between * time + (early ? 0 : time - last_begin) + (folds ? 0 : of_others);
  }
  // Parts that are computed before the chain's last CTA gets to it.
  TM_HOST_DEVICE int early_parts() const {
    return (last_begin < first ? last_begin : first) + between * last_begin;
  }
};

// For CTA `cta`, of the chain whose parts are units [begin, begin + parts).
TM_HOST_DEVICE PartOrder part_order(int units, int ctas, int cta, int begin, int parts) {
  const int first = cta_of(units, ctas, begin);
  const int last = cta_of(units, ctas, begin + parts - 1);
  const int last_end = run_begin(units, ctas, last + 1);
  PartOrder order{};
  order.last_begin = last_end - (begin + parts);
  order.last_end = last_end - run_begin(units, ctas, last);
  order.is_last = cta == last;
  order.is_folder = cta + 1 == last;
  if (first == last) return order;
  const int second_begin = run_begin(units, ctas, first + 1);
  order.first = second_begin - begin;
  order.shortest = static_cast<int>(static_cast<uint32_t>(units) / static_cast<uint32_t>(ctas));
  order.between = last - first - 1;
  if (cta == first) return order;
  order.later = 1;
  if (cta == last) return order;
  order.before = cta - first - 1;
  order.before_last = run_begin(units, ctas, cta) - second_begin - order.shortest * order.before;
  return order;
}

}  // namespace turbomind::cuda::decode
