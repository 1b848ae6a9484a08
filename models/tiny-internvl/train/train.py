"""Trains the model for a given wall-clock time on one GPU: the whole step is one CUDA graph, the data comes from a ring of
ready-made steps that worker processes fill.

    python train.py --fonts DIR ... --out weights --seconds 540
    python train.py --fonts DIR ... --out weights --seconds 270 --to 0.5        # in two pieces
    python train.py --fonts DIR ... --out weights --seconds 270 --from 0.5 --init weights

Weights are written as bf16 in pieces of less than 16 MB (weights-0.pt, ...), with the training-only heads.
"""
import argparse
import collections
import glob
import json
import math
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import data
import fast
import render
import samples


def rate(p, peak, warm, start):
    """Learning rate at progress p: short warm-up, constant to 0.45, then a cosine to a hundredth."""
    up = min(1.0, (p - start + 1e-4) / warm)
    if p < 0.45:
        return peak * up
    return peak * up * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (p - 0.45) / 0.55)))


def difficulty(p):
    return min(1.0, p / 0.45) ** 0.9


def weights_of_losses(p):
    """(classes, places, looks)"""
    fade = 1.0 - min(1.0, p / 0.6)
    return 0.15 + 0.45 * fade, 0.04 + 0.14 * fade, 0.10 + 0.20 * fade


def save(flat, path, limit=14 << 20):
    """bf16 pieces of at most `limit` bytes; the names are spread in order."""
    state = {k: v.bfloat16().cpu() for k, v in flat.state_dict().items()}
    pieces, size = [{}], 0
    for k, v in state.items():
        n = v.numel() * 2
        if size + n > limit:
            pieces.append({})
            size = 0
        pieces[-1][k] = v
        size += n
    for i, piece in enumerate(pieces):
        torch.save(piece, "%s-%d.pt.tmp" % (path, i))
        os.replace("%s-%d.pt.tmp" % (path, i), "%s-%d.pt" % (path, i))


def load(path):
    """Float32 state dict from the pieces that save() wrote."""
    files = sorted(glob.glob(path + "-*.pt"))
    if not files:
        raise SystemExit("no weights at %s-*.pt" % path)
    out = {}
    for f in files:
        out.update(torch.load(f, map_location="cpu"))
    return {k: v.float() for k, v in out.items()}


class Stepper:
    """The step as one CUDA graph over fixed buffers."""

    def __init__(self, flat, net, device):
        self.flat, self.net = flat, net
        size = data.layout()[1]
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self.b = {}
        kinds = {"uint8": torch.uint8, "int32": torch.int32, "float32": torch.float32}
        for name, (o, dtype, shape) in data.layout()[0].items():
            k = kinds[dtype.__name__]
            n = math.prod(shape) * k.itemsize
            self.b[name] = self.buffer[o:o + n].view(k).view(shape)
        self.coef = torch.zeros(4, device=device)                       # learning rate and the weights of the three losses
        n = len(samples.TASKS)
        self.loss, self.hits, self.count = (torch.zeros(n, device=device) for _ in range(3))
        self.other = torch.zeros(8, device=device)
        self.graph = None

    def run(self):
        r = self.net.forward(self.b)
        c = self.coef
        total = r["loss"] + c[1] * r["class"] + c[2] * r["place"] + c[3] * r["look"]
        grads = torch.autograd.grad(total, list(self.flat.leaf.values()))
        norm = self.flat.step(grads, c[0])
        with torch.no_grad():
            task, known = self.b["tgt_task"].long(), (self.b["tgt_w"] > 0).float()
            self.loss.index_add_(0, task, r["each"].detach() * known)
            self.hits.index_add_(0, task, r["hit"] * known)
            self.count.index_add_(0, task, known)
            self.other += torch.stack([torch.ones_like(norm), r["loss"], r["class"], r["place"], r["look"], r["chars"], r["chars_p"],
                                       norm]).detach()

    def capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def report(self):
        """Means since the last call."""
        loss, hits, count, other = (t.tolist() for t in (self.loss, self.hits, self.count, self.other))
        for t in (self.loss, self.hits, self.count, self.other):
            t.zero_()
        n = max(other[0], 1)
        out = collections.OrderedDict(zip(("loss", "class", "place", "look", "chars", "chars_p", "norm"), (round(x / n, 3) for x in other[1:])))
        for i, name in enumerate(samples.TASKS):
            if count[i]:
                out[name] = "%.3f/%.3f" % (loss[i] / count[i], hits[i] / count[i])
        return out


def feed(ring, stepper, device, repeat):
    """Yields once per step, with the data of the step on its way to the stepper's buffer. A step's data is used again, at most
    `repeat` times in all, while no new one is ready."""
    host = torch.frombuffer(ring.memory, dtype=torch.uint8)
    err = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0)
    pinned = int(err) == 0
    staging = [torch.empty(ring.bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    copied, used = [torch.cuda.Event() for _ in range(2)], [torch.cuda.Event() for _ in range(2)]
    copier, pending, k = torch.cuda.Stream(), collections.deque(), 0
    stats = {"pinned": pinned, "new": 0, "again": 0, "waited": 0.0}

    def start(i):
        slot = ring.ready.get()
        with torch.cuda.stream(copier):
            copier.wait_event(used[i])
            staging[i].copy_(host[slot * ring.bytes:(slot + 1) * ring.bytes], non_blocking=True)
            copied[i].record(copier)
        pending.append((slot, i))
    start(0)
    times = repeat
    while True:
        if times < repeat and ring.ready.empty():
            times += 1
            stats["again"] += 1
        else:
            t = time.time()
            start((k + 1) % 2)
            stats["waited"] += time.time() - t
            i = k % 2
            torch.cuda.current_stream().wait_event(copied[i])
            stepper.buffer.copy_(staging[i])
            used[i].record()
            slot, j = pending.popleft()
            copied[j].synchronize()
            ring.free.put(slot)
            k += 1
            times = 1
            stats["new"] += 1
        yield stats


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--fonts", nargs="+", required=True)
    ap.add_argument("--out", required=True, help="prefix of the weight files")
    ap.add_argument("--seconds", type=float, default=540)
    ap.add_argument("--from", dest="start", type=float, default=0.0, help="progress at the beginning (0 to 1)")
    ap.add_argument("--to", type=float, default=1.0, help="progress at the end")
    ap.add_argument("--init", help="prefix of weight files to go on from")
    ap.add_argument("--lr", type=float, default=1.6e-3)
    ap.add_argument("--muon-factor", type=float, default=2.5)
    ap.add_argument("--adam", action="store_true", help="AdamW for everything")
    ap.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    ap.add_argument("--slots", type=int, default=48)
    ap.add_argument("--repeat", type=int, default=2)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--no-compile", action="store_true")
    ap.add_argument("--every", type=int, default=250, help="steps between two lines of the log")
    ap.add_argument("--profile", help="write the kernels of a step to this file at the end")
    ap.add_argument("--give-up", type=float, default=0.0, help="stop halfway if the loss on single lines is still above this")
    a = ap.parse_args()
    began = time.time()
    say = lambda *x: print("[%6.1fs]" % (time.time() - began), *x, flush=True)

    ring = data.Ring(render.find_fonts(*a.fonts), a.workers, a.slots, a.seed + int(1000 * a.start))
    ring.difficulty.value = difficulty(a.start)
    device = "cuda"
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    state = fast.initial_state(a.seed)
    if a.init:
        state.update(load(a.init))
    flat = fast.Flat(state, device, muon=not a.adam)
    flat.muon_factor = a.muon_factor
    say("parameters %.2f M (with training-only heads %.2f M)" % (
        sum(v.numel() for k, v in state.items() if "aux_" not in k) / 1e6, sum(v.numel() for v in state.values()) / 1e6))
    net = fast.Network(flat, device, compile=not a.no_compile)
    stepper = Stepper(flat, net, device)
    source = feed(ring, stepper, device, a.repeat)
    next(source)
    say("first data is there")
    keep = {k: t.clone() for k, t in (("p", flat.p), ("m", flat.m), ("v", flat.v), ("t", flat.t))}
    stepper.capture()
    for k, t in keep.items():                              # the warm-up steps leave no trace
        getattr(flat, k).copy_(t)
    flat.p16.copy_(flat.p)
    stepper.report()
    torch.cuda.synchronize()
    say("captured; memory %.1f GB" % (torch.cuda.max_memory_allocated() / 1e9))

    step, t0, last, done, saved = 0, time.time(), time.time(), collections.deque(), 0
    while True:
        share = (time.time() - t0) / a.seconds
        p = a.start + (a.to - a.start) * share
        if share >= 1:
            break
        ring.difficulty.value = difficulty(p)
        lr = rate(p, a.lr, 0.01, a.start)
        for i, x in enumerate((lr,) + weights_of_losses(p)):
            stepper.coef[i].fill_(x)
        stats = next(source)
        stepper.graph.replay()
        e = torch.cuda.Event()
        e.record()
        done.append(e)
        if len(done) > 3:
            done.popleft().synchronize()
        step += 1
        if step % a.every == 0 or step in (20, 50, 100):
            r = stepper.report()
            now = time.time()
            since = a.every if step % a.every == 0 and step > 250 else None
            print(json.dumps(dict({"step": step, "s": round(now - t0, 1), "p": round(p, 3), "d": round(difficulty(p), 2), "lr": round(lr, 5),
                                   "ms": round((now - last) / since * 1e3, 2) if since else None, "new": stats["new"],
                                   "again": stats["again"], "waited": round(stats["waited"], 1)}, **r)), flush=True)
            last = now
            if not math.isfinite(r["loss"]):
                raise SystemExit("the loss is no number any more")
            if a.give_up and p > (a.start + a.to) / 2 and "line" in r and float(r["line"].split("/")[0]) > a.give_up:
                say("gave up: loss on lines", r["line"])
                break
        if time.time() - t0 > 90 * (saved + 1):
            saved += 1
            save(flat, a.out)
    torch.cuda.synchronize()
    say("done: %d steps, %.2f ms a step, %d new, %d used again, pinned %s" % (step, (time.time() - t0) / step * 1e3, stats["new"], stats["again"],
                                                                         stats["pinned"]))
    save(flat, a.out)
    ring.stop()
    if a.profile:
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
            for _ in range(4):
                stepper.graph.replay()
            torch.cuda.synchronize()
        with open(a.profile, "w") as f:
            f.write(prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110))
    os._exit(0)


if __name__ == "__main__":
    main()
