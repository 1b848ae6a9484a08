"""Packs examples into steps of one fixed shape, and lets worker processes fill a ring of such steps in shared memory.

A step holds TILES picture tiles, TOKENS text and image tokens of at most SEQS conversations one behind the other, TARGETS
predicted tokens, LOOKS positions whose attention is taught and MARKS labelled half patches. Whatever is left over is padded
with entries that count nothing, so that one CUDA graph serves every step.
"""
import mmap
import multiprocessing
import os
import sys
import time
import traceback

import numpy as np

import samples
from preprocess import TILE

TILES, TOKENS, SEQS, TARGETS, LOOKS, CANDS, MARKS = 96, 16384, 192, 5120, 2048, 64, 4096
CHAT = 2200                           # tokens kept free for conversations without a picture
LONGEST = 1536                        # tokens of one conversation at most


def fields():
    """[(name, dtype, shape)] of the arrays of a step."""
    return [("tiles", np.uint8, (TILES, TILE, TILE, 3)), ("sigma", np.float32, (TILES,)), ("ids", np.int32, (TOKENS,)),
            ("pos", np.int32, (TOKENS,)), ("bounds", np.int32, (SEQS + 1,)), ("vis_at", np.int32, (TILES * 64,)),
            ("tgt", np.int32, (TARGETS,)), ("tgt_id", np.int32, (TARGETS,)), ("tgt_w", np.float32, (TARGETS,)),
            ("tgt_task", np.int32, (TARGETS,)), ("look", np.int32, (LOOKS,)), ("look_to", np.int32, (LOOKS, 2)),
            ("look_w", np.float32, (LOOKS,)), ("cands", np.int32, (LOOKS, CANDS)), ("marks", np.int32, (MARKS, 4))]


def layout():
    """({name: (offset, dtype, shape)}, bytes of a step)"""
    at, out = 0, {}
    for name, dtype, shape in fields():
        out[name] = (at, dtype, shape)
        at += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 256) * 256
    return out, at


def views(buffer, base=0):
    return {n: np.frombuffer(buffer, d, int(np.prod(s)), base + o).reshape(s) for n, (o, d, s) in layout()[0].items()}


MULTI = [3, 3, 3, 4, 5, 5, 7, 10, 13, 13]          # tiles of the pictures that are cut, as often as they come


def multi_share(d):
    """Share of the tiles that belongs to pictures of several tiles."""
    return 0.55 * max(0.0, min(1.0, (d - 0.2) / 0.5))


def fill(s, d, out):
    """Fills the arrays of `out` with one step at difficulty d."""
    r = s.r
    picked, tiles, tokens = [], 0, 0
    quota = int(TILES * multi_share(d) * r.uniform(0.8, 1.2))
    while quota - tiles >= 3:
        e = s.example(*s.multi(r.choice([k for k in MULTI if k <= quota - tiles]), s.ease(d)))
        n = sum(len(t) for t in e.tiles)
        if len(e.ids) > LONGEST or tokens + len(e.ids) + (TILES - tiles - n) * 150 > TOKENS - CHAT:
            break
        picked.append(e)
        tiles, tokens = tiles + n, tokens + len(e.ids)
    while tiles < TILES:
        room = TOKENS - CHAT - tokens - (TILES - tiles - 1) * 130
        for k in range(40):
            e = s.example(*(s.single(s.ease(d)) if k < 12 else s.single(0.0, "ocr")))
            if len(e.ids) <= room and len(e.tiles[0]) == 1:
                break
        else:
            raise RuntimeError("no short example found")
        picked.append(e)
        tiles, tokens = tiles + 1, tokens + len(e.ids)
    misses = 0
    while misses < 6 and len(picked) < SEQS - 1:
        e = s.example(*s.text_chat())
        if tokens + len(e.ids) > TOKENS:
            misses += 1
            continue
        picked.append(e)
        tokens += len(e.ids)
    out["ids"][:] = s.ids["<|endoftext|>"]
    out["pos"][:] = 0
    out["bounds"][:] = TOKENS
    spread = np.arange(max(TARGETS, LOOKS, MARKS))
    out["tgt"][:], out["tgt_id"][:], out["tgt_w"][:], out["tgt_task"][:] = spread[:TARGETS], 0, 0, 0
    out["look"][:], out["look_w"][:], out["look_to"][:], out["cands"][:] = spread[:LOOKS], 0, 0, 0
    out["marks"][:] = -100
    out["marks"][:, 0] = spread[:MARKS]
    at = tile = 0
    looks, marks, tgts = [], [], []
    for i, e in enumerate(picked):
        n = len(e.ids)
        out["ids"][at:at + n] = e.ids
        out["pos"][at:at + n] = np.arange(n)
        out["bounds"][i] = at
        for k, t in enumerate(e.tiles):
            out["tiles"][tile:tile + len(t)] = t
            out["sigma"][tile:tile + len(t)] = e.sigma[k]
            count = len(t) * 64
            out["vis_at"][tile * 64:tile * 64 + count] = at + e.image_at[k] + np.arange(count)
            m = e.marks[k].copy()
            m[:, 0] += tile * 512
            marks.append(m)
            look = e.look[e.look[:, 3] == k]
            if len(look):
                base = at + e.image_at[k]
                to = look[:, 1:3] + at
                if count <= CANDS:
                    c = np.broadcast_to(base + np.arange(64), (len(look), 64))
                else:
                    c = base + s.rng.integers(0, count, (len(look), CANDS))
                    c[:, :2] = to
                looks.append((look[:, 0] + at, to, c))
            tile += len(t)
        tgts.append((e.tgt - 1 + at, e.ids[e.tgt], e.weight, e.task))
        at += n
    out["bounds"][len(picked)] = at
    tgt = [np.concatenate([t[k] for t in tgts])[:TARGETS] for k in range(4)]
    n = len(tgt[0])
    out["tgt"][:n], out["tgt_id"][:n], out["tgt_w"][:n], out["tgt_task"][:n] = tgt
    if looks:
        q, to, c = (np.concatenate([x[k] for x in looks]) for k in range(3))
        keep = np.arange(len(q)) if len(q) <= LOOKS else np.sort(s.rng.permutation(len(q))[:LOOKS])
        n = len(keep)
        out["look"][:n], out["look_to"][:n], out["cands"][:n], out["look_w"][:n] = q[keep], to[keep], c[keep], 1
    m = np.concatenate(marks)
    m = m[s.rng.permutation(len(m))[:MARKS]] if len(m) > MARKS else m
    out["marks"][:len(m)] = m
    return {"sequences": len(picked), "tokens": tokens, "targets": sum(len(t[0]) for t in tgts), "looks": sum(len(x[0]) for x in looks),
            "marks": sum(len(x) for x in marks)}


class Ring:
    """`slots` steps in shared memory, filled by `workers` processes. Start it before CUDA is touched: it forks.
    `difficulty` is read by the workers at each step."""

    def __init__(self, fonts, workers, slots, seed):
        self.bytes = layout()[1]
        self.memory = mmap.mmap(-1, self.bytes * slots)
        ctx = multiprocessing.get_context("fork")
        self.difficulty = ctx.Value("d", 0.0)
        self.free, self.ready = ctx.SimpleQueue(), ctx.SimpleQueue()
        for i in range(slots):
            self.free.put(i)
        self.workers = [ctx.Process(target=self._work, args=(fonts, seed * 1000 + k), daemon=True) for k in range(workers)]
        for p in self.workers:
            p.start()

    def _work(self, fonts, seed):
        os.environ["OMP_NUM_THREADS"] = "1"
        s = samples.Sampler(seed, fonts)
        failed = 0
        while True:
            slot = self.free.get()
            out = views(self.memory, slot * self.bytes)
            while True:
                try:
                    fill(s, self.difficulty.value, out)
                    break
                except Exception:                            # one bad picture must not end a run
                    failed += 1
                    if failed < 4:
                        traceback.print_exc()
                        sys.stderr.flush()
            self.ready.put(slot)

    def stop(self):
        for p in self.workers:
            p.kill()


if __name__ == "__main__":
    import render
    ring = Ring(render.find_fonts(*sys.argv[2:]), int(sys.argv[1]), 8, 1)
    for d in (0.0, 0.5, 1.0):
        ring.difficulty.value = d
        for k in range(24):
            slot = ring.ready.get()
            if k == 8:
                t = time.time()
            ring.free.put(slot)
        print("difficulty %.1f: %.0f tiles/s" % (d, 16 * TILES / (time.time() - t)), flush=True)
    ring.stop()
