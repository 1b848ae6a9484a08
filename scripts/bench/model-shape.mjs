// The shape both benchmark models share: Qwen2.5-0.5B (its public config.json), and the seeded
// random bytes they are filled with. Weights are random and never zero.

export const SHAPE = {
  hidden: 896,
  layers: 24,
  heads: 14,
  kvHeads: 2,
  headDim: 64,
  intermediate: 4864,
  vocab: 151_936,
  positions: 32_768,
  ropeTheta: 1_000_000,
  normEps: 1e-6,
};

/** xorshift128+: fast, seeded, good enough to fill weights. */
export class Random {
  #a;
  #b;
  constructor(seed) {
    this.#a = BigInt(seed) * 0x9e3779b97f4a7c15n + 1n;
    this.#b = 0x2545f4914f6cdd1dn;
    this.block = new BigUint64Array(8192);
    for (let i = 0; i < this.block.length; i++) {
      const mask = (1n << 64n) - 1n;
      let x = this.#a & mask;
      const y = this.#b & mask;
      this.#a = y;
      x ^= (x << 23n) & mask;
      this.#b = x ^ y ^ (x >> 17n) ^ (y >> 26n);
      this.block[i] = (this.#b + y) & mask;
    }
    this.bytesBlock = new Uint8Array(this.block.buffer);
    this.state = seed >>> 0 || 1;
  }
  /** Uniform 32-bit integer. */
  next() {
    let x = this.state;
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    this.state = x >>> 0;
    return this.state;
  }
  /** Uniform in [0, 1). */
  uniform() {
    return this.next() / 4294967296;
  }
  /** Roughly normal, standard deviation 1 (sum of four uniforms). */
  normal() {
    return (this.uniform() + this.uniform() + this.uniform() + this.uniform() - 2) * Math.sqrt(3);
  }
  /** Random bytes, cut from a 64 KiB block at random places. */
  fill(bytes) {
    const block = this.bytesBlock;
    for (let at = 0; at < bytes.length; ) {
      const from = this.next() % (block.length / 2);
      const n = Math.min(bytes.length - at, block.length - from);
      bytes.set(block.subarray(from, from + n), at);
      at += n;
    }
    return bytes;
  }
}

const f32 = new Float32Array(1);
const u32 = new Uint32Array(f32.buffer);

/** Float to bfloat16 bits, round to nearest even. */
export function bf16(value) {
  f32[0] = value;
  const bits = u32[0];
  return ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16) & 0xffff;
}

/** Float to float16 bits for normal positive or negative values of ordinary size. */
export function f16(value) {
  f32[0] = value;
  const bits = u32[0];
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 0xff) - 112;
  const mantissa = bits & 0x7fffff;
  if (exponent <= 0) return sign;
  return sign | ((exponent << 10) + ((mantissa + 0x1000) >>> 13));
}
