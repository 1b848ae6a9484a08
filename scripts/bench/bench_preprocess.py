"""Pillow + numpy side of scripts/bench/bench-preprocess.mjs: what internvl_chat's load_image does after
decoding. One process, one thread, as a Python server runs it. Prints one JSON line.

usage: bench_preprocess.py TILE MAX_TILES REPEATS WIDTHxHEIGHT ...
"""
import json
import sys
import time

import numpy as np
import PIL
from PIL import Image

MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32).reshape(1, 3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32).reshape(1, 3, 1, 1)


def choose_grid(width, height, tile, max_tiles):
    grids = {(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles + 1) if i * j <= max_tiles}
    best, best_difference = (1, 1), float("inf")
    for grid in sorted(grids, key=lambda g: g[0] * g[1]):
        difference = abs(width / height - grid[0] / grid[1])
        if difference < best_difference:
            best, best_difference = grid, difference
        elif difference == best_difference and width * height > 0.5 * tile * tile * grid[0] * grid[1]:
            best = grid
    return best


def cut(image, tile, max_tiles):
    columns, rows = choose_grid(*image.size, tile, max_tiles)
    whole = image.resize((columns * tile, rows * tile), Image.BICUBIC)
    tiles = [
        whole.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile))
        for y in range(rows)
        for x in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(image.resize((tile, tile), Image.BICUBIC))
    return tiles


def normalise(tiles):
    pixels = np.stack([np.asarray(t) for t in tiles]).transpose(0, 3, 1, 2)
    return (pixels.astype(np.float32) / 255.0 - MEAN) / STD


def median_ms(run, repeats):
    """Median wall time and mean processor time of one run."""
    times = []
    cpu = time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    cpu_ms = (time.process_time() - cpu) * 1e3 / repeats
    return sorted(times)[len(times) // 2], cpu_ms


def main():
    tile, max_tiles, repeats = (int(text) for text in sys.argv[1:4])
    rng = np.random.default_rng(1)
    results = {}
    for name in sys.argv[4:]:
        width, height = (int(text) for text in name.split("x"))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        normalised_ms, cpu_ms = median_ms(lambda: normalise(cut(image, tile, max_tiles)), repeats)
        tiles_ms, tiles_cpu_ms = median_ms(lambda: cut(image, tile, max_tiles), repeats)
        results[name] = {
            "normalised_ms": normalised_ms,
            "cpu_ms": cpu_ms,
            "tiles_ms": tiles_ms,
            "tiles_cpu_ms": tiles_cpu_ms,
        }
    print(json.dumps({"pillow": PIL.__version__, "numpy": np.__version__, "results": results}))


if __name__ == "__main__":
    main()
