#!/usr/bin/env python3
"""Measures what a GPU host can do at most, as JSON: device copy, bf16 matrix product, pinned upload, file read.

  device_peaks.py OUT.json [--file FILE]
--file: a large file to read from disk past the page cache (its share in the cache is dropped first).
"""
import argparse
import json
import os
import time

import torch


def median_seconds(body, repeats=9):
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        body()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2]


def disk_bytes_per_second(path, limit=4 << 30):
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    size = min(os.fstat(descriptor).st_size, limit)
    buffer = bytearray(8 << 20)
    begin = time.perf_counter()
    done = 0
    while done < size:
        count = os.preadv(descriptor, [buffer], done)
        if count <= 0:
            break
        done += count
    seconds = time.perf_counter() - begin
    os.close(descriptor)
    return done / seconds


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--file")
    args = parser.parse_args()
    size = 2 << 30
    a = torch.empty(size, dtype=torch.uint8, device="cuda").random_(0, 255)
    b = torch.empty_like(a)
    copy = 2 * size / median_seconds(lambda: b.copy_(a))
    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    upload = host.numel() / median_seconds(lambda: a[: host.numel()].copy_(host, non_blocking=True), 5)
    del a, b
    n = 8192
    x = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    product = 2 * n**3 / median_seconds(lambda: x @ y, 15)
    peaks = {
        "device": torch.cuda.get_device_name(0),
        "copyTBs": copy / 1e12,
        "bf16TFLOPs": product / 1e12,
        "uploadGBs": upload / 1e9,
    }
    if args.file:
        peaks["diskGBs"] = disk_bytes_per_second(args.file) / 1e9
    with open(args.out, "w", encoding="utf8") as out:
        json.dump(peaks, out, indent=1)
    print(json.dumps(peaks))


main()
