import { describe, expect, test } from 'vitest';
import {
  integersBetween,
  type NumberBounds,
  numbersBetween,
} from '../../../lib/structured/numbers.js';
import { allows, makeRandom } from './patterns.js';

const random = makeRandom(11);

function pick(): number {
  const [a, b] = [random(2001) - 1000, random(200_001) - 100_000];
  return [a / 100, b / 1000, random(21) - 10, random(10), random(3) / 10][random(5)] ?? 0;
}

function makeBounds(): NumberBounds {
  const [a, b] = [pick(), pick()].sort((x, y) => x - y);
  return {
    min: random(6) > 0 ? (a ?? 0) : Number.NEGATIVE_INFINITY,
    max: random(6) > 0 ? (b ?? 0) : Number.POSITIVE_INFINITY,
    isMinExclusive: random(3) === 0,
    isMaxExclusive: random(3) === 0,
  };
}

function isInside(value: number, bounds: NumberBounds): boolean {
  const { min, max, isMinExclusive, isMaxExclusive } = bounds;
  return (
    (isMinExclusive ? value > min : value >= min) && (isMaxExclusive ? value < max : value <= max)
  );
}

describe('numbers between bounds', () => {
  test('are those that compare so, and no others', () => {
    for (let round = 0; round < 800; round += 1) {
      const bounds = makeBounds();
      const [numbers, integers] = [numbersBetween(bounds), integersBetween(bounds)];
      for (const near of [bounds.min, bounds.max, (bounds.min + bounds.max) / 2, pick(), 0]) {
        if (!Number.isFinite(near)) continue;
        for (const step of [0, 0.001, -0.001, 0.1, -1]) {
          const value = Number((near + step).toFixed(random(5)));
          const text = String(value === 0 ? 0 : value);
          if (text.includes('e')) continue;
          const label = `${text} in ${JSON.stringify(bounds)}`;
          const wanted = isInside(value, bounds);
          expect(numbers !== undefined && allows(numbers, text), label).toBe(wanted);
          if (!Number.isInteger(value)) continue;
          expect(integers !== undefined && allows(integers, text), label).toBe(wanted);
        }
      }
    }
  });

  test('are written as JSON: no leading nought, no minus nought, no point at the end', () => {
    const bounds = { min: -20, max: 30, isMinExclusive: false, isMaxExclusive: false };
    const [numbers, integers] = [numbersBetween(bounds), integersBetween(bounds)];
    for (const pattern of [numbers, integers]) {
      if (pattern === undefined) throw new Error('there are numbers');
      for (const text of ['01', '-0', '+1', '1.', '.5', '', '-', '1e1']) {
        expect(allows(pattern, text), text).toBe(false);
      }
    }
  });

  test('with so many places behind the point', () => {
    const bounds = { min: 0, max: 5, isMinExclusive: false, isMaxExclusive: false };
    const cents = numbersBetween(bounds, 2);
    if (cents === undefined) throw new Error('there are numbers');
    expect(['0', '4.99', '3.5', '5'].map((text) => allows(cents, text))).toEqual(
      Array(4).fill(true),
    );
    expect(['4.999', '5.01'].map((text) => allows(cents, text))).toEqual([false, false]);
  });
});
