// Small statistics of the benchmarks. Pure functions.

/** The value below which `share` of the list lies. */
export function quantile(list, share) {
  const sorted = [...list].sort((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) * share)];
}

export function round(number) {
  return Math.round(number * 1000) / 1000;
}
