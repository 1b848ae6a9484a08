"""The same network as model.py, laid out for training: every matrix is a view of one flat buffer (so that q, k and v are one
product and the optimiser a handful of kernels), conversations stand packed one behind the other, all shapes are fixed.

The state dict has model.py's names. Heads named aux_* exist only during training.
"""
import math

import torch
import torch.nn.functional as F

import data
import render
from model import TEXT, VISION, TinyInternVL

V, L = VISION, TEXT
HEADS, KV, DIM = L["heads"], L["kv_heads"], L["hidden"] // L["heads"]
CLASSES = render.N_CLASS + render.N_COLUMN + render.N_LINE
VT, LT = "model.vision_tower.encoder.layer.%d.", "model.language_model.layers.%d."
LOOK_LAYERS = (2, 3)                        # layers whose first head is taught where to look
DTYPE = torch.bfloat16                      # of weights and activations; float32 in tests
CUT = (render.N_CLASS, render.N_COLUMN, render.N_LINE)


def plan():
    """[(leaf name, [state names], shape of the leaf)]: first the matrices for Muon, grouped by shape; then the rest."""
    groups = {}
    one = lambda shape, name, names=None, rows=None: groups.setdefault(shape, []).append((name, names or [name]))
    vh, vm, lh, lm, kv = V["hidden"], V["mlp"], L["hidden"], L["mlp"], KV * DIM
    for i in range(V["layers"]):
        p = VT % i
        one((vh, vh), p + "qkv.weight", [p + "attention.%s_proj.weight" % c for c in "qkv"])
        one((vh, vh), p + "attention.projection_layer.weight")
        one((vm, vh), p + "mlp.fc1.weight")
        one((vh, vm), p + "mlp.fc2.weight")
    for i in range(L["layers"]):
        p = LT % i
        one((lh, lh), p + "self_attn.q_proj.weight")
        one((lh, lh), p + "self_attn.o_proj.weight")
        one((kv, lh), p + "kv.weight", [p + "self_attn.%s_proj.weight" % c for c in "kv"])
        one((lm, lh), p + "gate_up.weight", [p + "mlp.%s_proj.weight" % c for c in ("gate", "up")])
        one((lh, lm), p + "mlp.down_proj.weight")
    one((lh, 4 * vh), "model.multi_modal_projector.linear_1.weight")
    one((lh, lh), "model.multi_modal_projector.linear_2.weight")
    return groups


class Flat:
    """Float32 master weights, bf16 copies that the network reads, and the optimiser: Muon for the matrices inside the layers,
    AdamW for the rest (all AdamW if muon is False)."""

    def __init__(self, state, device, muon=True):
        self.leaf, self.where, self.muon_groups = {}, {}, []
        at, taken, leaves = 0, set(), []
        for (r, c), entries in plan().items():
            first, n = at, 0
            for name, names in entries:
                for k in names:
                    self.where[k] = (at, (r, c))
                    at += r * c
                    taken.add(k)
                    n += 1
                leaves.append((name, at - len(names) * r * c, (len(names) * r, c)))
            self.muon_groups.append((first, n, r, c))
        self.n_muon = at
        fused = {}
        for i in range(V["layers"]):
            fused[VT % i + "qkv.bias"] = [VT % i + "attention.%s_proj.bias" % c for c in "qkv"]
        for i in range(L["layers"]):
            fused[LT % i + "kv.bias"] = [LT % i + "self_attn.%s_proj.bias" % c for c in "kv"]
        fused_names = {n for v in fused.values() for n in v}
        rest = list(fused.items()) + [(k, [k]) for k in state if k not in taken and k not in fused_names]
        for name, names in rest:
            start = at
            for k in names:
                self.where[k] = (at, tuple(state[k].shape))
                at += state[k].numel()
            shape = tuple(state[names[0]].shape) if len(names) == 1 else (at - start,)
            leaves.append((name, start, shape))
            at = -(-at // 64) * 64
        self.total = at
        f = lambda dtype=torch.float32: torch.zeros(at, device=device, dtype=dtype)
        self.p, self.p16, self.g16, self.m, self.v = f(), f(DTYPE), f(DTYPE), f(), f()
        self.decay = f()
        for k, (o, shape) in self.where.items():
            self.p[o:o + math.prod(shape)] = state[k].detach().to(device).float().reshape(-1)
            self.decay[o:o + math.prod(shape)] = 1.0 if len(shape) > 1 and "embeddings" not in k else 0.0
        self.p16.copy_(self.p)
        self.grads = []
        for name, o, shape in leaves:
            n = math.prod(shape)
            self.leaf[name] = self.p16[o:o + n].view(shape).detach().requires_grad_()
            self.grads.append(self.g16[o:o + n].view(shape))
        self.muon, self.muon_factor = muon, 2.5
        self.t = torch.zeros((), device=device)

    def state_dict(self):
        return {k: self.p[o:o + math.prod(s)].view(s).clone() for k, (o, s) in self.where.items()}

    @torch.no_grad()
    def step(self, grads, lr, wd=0.05, betas=(0.9, 0.95), eps=1e-8):
        """lr: 0-d tensor, the rate of AdamW; that of Muon is muon_factor times it, with updates of RMS 0.2. Returns the gradient norm."""
        torch._foreach_copy_(self.grads, list(grads))
        g = self.g16.float()
        norm = g.norm()
        g = g * (1.0 / (norm + 1e-6)).clamp(max=1.0)
        self.t += 1
        n = self.n_muon if self.muon else 0
        if n:
            m = self.m[:n]
            m.lerp_(g[:n], 0.05)
            u = torch.lerp(g[:n], m, 0.95)
            out = torch.empty_like(u)
            for first, k, r, c in self.muon_groups:
                o = orthogonal(u[first:first + k * r * c].view(k, r, c))
                out[first:first + k * r * c] = (o * (0.2 * max(r, c) ** 0.5)).reshape(-1)
            p = self.p[:n]
            p.sub_(lr * self.muon_factor * (out + wd * p))
        g, m, v, p = g[n:], self.m[n:], self.v[n:], self.p[n:]
        m.lerp_(g, 1 - betas[0])
        v.lerp_(g * g, 1 - betas[1])
        u = m / (1 - betas[0] ** self.t) / ((v / (1 - betas[1] ** self.t)).sqrt() + eps)
        p.sub_(lr * (u + wd * self.decay[n:] * p))
        self.p16.copy_(self.p)
        return norm


def orthogonal(x, steps=5):
    """Newton-Schulz iteration of Muon (Jordan et al. 2024) on a stack of matrices [k, r, c]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        y = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, y, x, beta=a)
    return (x.mT if tall else x).float()


# ---- attention over packed sequences -----------------------------------------
def attention_loop(q, k, v, bounds, longest):
    """Reference: one sequence after the other. q, k, v [N, heads, DIM] -> [N, heads * DIM]."""
    out = torch.zeros_like(q)
    b = bounds.tolist()
    for s, e in zip(b[:-1], b[1:]):
        if e > s:
            y = F.scaled_dot_product_attention(q[None, s:e].transpose(1, 2), k[None, s:e].transpose(1, 2), v[None, s:e].transpose(1, 2),
                                               is_causal=True)
            out = out.index_copy(0, torch.arange(s, e, device=q.device), y.transpose(1, 2)[0])
    return out.flatten(1)


def attention_flash(q, k, v, bounds, longest):
    return torch.ops.aten._flash_attention_forward(q, k, v, bounds, bounds, longest, longest, 0.0, True, False)[0].flatten(1)


def attention_varlen(q, k, v, bounds, longest):
    from torch.nn.attention.varlen import varlen_attn
    try:
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, is_causal=True).flatten(1)
    except TypeError:
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0)).flatten(1)


def attention_efficient(q, k, v, bounds, longest):
    return torch.ops.aten._efficient_attention_forward(q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, 1, True)[0][0].flatten(1)


def pick_attention(device, log=print):
    """The first fast path whose output and gradients equal the loop's."""
    if device == "cpu":
        return attention_loop
    g = torch.Generator(device).manual_seed(0)
    n = 700
    bounds = torch.tensor([0, 130, 131, 640, n, n, n], dtype=torch.int32, device=device)
    mk = lambda: torch.randn(n, HEADS, DIM, generator=g, device=device).bfloat16().requires_grad_()
    qkv, w = [mk() for _ in range(3)], torch.randn(n, HEADS * DIM, generator=g, device=device).bfloat16()

    def both(f):
        y = f(*qkv, bounds, 600)
        return [y.float()] + [t.float() for t in torch.autograd.grad((y * w).sum(), qkv)]
    want = both(attention_loop)
    for f in (attention_flash, attention_varlen, attention_efficient):
        try:
            worst = max(((x - y).norm() / y.norm()).item() for x, y in zip(both(f), want))
            log("%s: relative difference to the loop %.1e" % (f.__name__, worst))
            if worst < 2e-2:
                return f
        except Exception as e:
            log("%s does not run here: %s" % (f.__name__, repr(e)[:200]))
    raise SystemExit("no fast attention over packed sequences")


# ---- pieces that a compiler fuses --------------------------------------------
def normalise(tiles, sigma, mean, std):
    """uint8 [T, S, S, 3] -> bf16 patches [T, 256, 588] with noise of `sigma` levels added."""
    t, g = tiles.shape[0], V["image"] // V["patch"]
    noise = (torch.rand(tiles.shape, device=tiles.device) - 0.5) * 3.46
    x = (tiles.float() + noise * sigma.view(-1, 1, 1, 1)).clamp(0, 255)
    x = ((x - mean) / std).to(DTYPE)
    return x.view(t, g, V["patch"], g, V["patch"], 3).permute(0, 1, 3, 5, 2, 4).reshape(t, g * g, -1)


def layer_norm(x, w, b, eps):
    return F.layer_norm(x, (x.shape[-1],), w, b, eps)


def rms_norm(x, w, eps):
    f = x.float()
    return w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def vision_layer(x, n1, b1, qkv, qkvb, proj, projb, l1, n2, b2, fc1, fc1b, fc2, fc2b, l2):
    t, n, h = x.shape
    y = F.linear(layer_norm(x, n1, b1, V["eps"]), qkv, qkvb).view(t, n, 3, V["heads"], h // V["heads"]).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(y[0], y[1], y[2]).transpose(1, 2).reshape(t, n, h)
    x = x + l1 * F.linear(y, proj, projb)
    y = F.gelu(F.linear(layer_norm(x, n2, b2, V["eps"]), fc1, fc1b))
    return x + l2 * F.linear(y, fc2, fc2b)


def rope(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def text_before(x, cos, sin, n1, wq, bq, wkv, bkv):
    """-> q, k, v [N, HEADS, DIM]; k and v repeated for the grouped heads."""
    y = rms_norm(x, n1, L["eps"])
    q = rope(F.linear(y, wq, bq).view(-1, HEADS, DIM), cos, sin)
    kv = F.linear(y, wkv, bkv).view(-1, 2, KV, DIM)
    k, v = rope(kv[:, 0], cos, sin), kv[:, 1]
    g = HEADS // KV
    return q, k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)


def text_after(x, y, wo, n2, wgu, wd):
    x = x + F.linear(y, wo)
    g, u = F.linear(rms_norm(x, n2, L["eps"]), wgu).chunk(2, -1)
    return x + F.linear(F.silu(g) * u, wd)


def look_loss(q, k, look, look_to, look_w, cands):
    """-log of the share of attention that falls on the right tokens, among all candidates and the last eight tokens.
    q, k [N, DIM] of one head."""
    recent = (look[:, None] - torch.arange(8, device=look.device)).clamp(min=0)
    c = torch.cat([cands, recent], 1)
    keys = k.index_select(0, c.view(-1)).view(*c.shape, -1)
    s = torch.einsum("kd,kcd->kc", q.index_select(0, look), keys).float() * DIM ** -0.5
    right = (c[:, :, None] == look_to[:, None, :]).any(-1)
    loss = s.logsumexp(-1) - s.masked_fill(~right, float("-inf")).logsumexp(-1)
    loss = torch.where(look_w > 0, loss, torch.zeros_like(loss))
    return loss.sum() / look_w.sum().clamp(min=1)


class Network:
    def __init__(self, flat, device, compile=True):
        self.w, self.device = flat.leaf, device
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device) * 255
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device) * 255
        inv = 1.0 / L["theta"] ** (torch.arange(0, DIM, 2, device=device).float() / DIM)
        f = torch.outer(torch.arange(data.LONGEST, device=device).float(), inv)
        self.cos, self.sin = f.cos()[:, None], f.sin()[:, None]
        self.vocab = torch.arange(L["vocab"], device=device, dtype=torch.int32)
        self.attention = pick_attention(device)
        c = (lambda fn: torch.compile(fn, dynamic=False)) if compile else (lambda fn: fn)
        self.normalise, self.vision_layer, self.before, self.after, self.look_loss = map(
            c, (normalise, vision_layer, text_before, text_after, look_loss))
        self.projector, self.final = c(self._projector), c(self._final)

    def _projector(self, x, n, b, w1, b1, w2, b2):
        t, g, h = x.shape[0], V["image"] // V["patch"], V["hidden"]
        x = x.view(t, g // 2, 2, g // 2, 2, h).permute(0, 1, 3, 2, 4, 5).reshape(t, g * g // 4, 4 * h)
        return F.linear(F.gelu(F.linear(layer_norm(x, n, b, 1e-5), w1, b1)), w2, b2)

    def _final(self, x, n, emb, tgt, tgt_id):
        """(loss of each target, whether the best token is the right one)"""
        logits = F.linear(rms_norm(x.index_select(0, tgt), n, L["eps"]), emb).float()
        return F.cross_entropy(logits, tgt_id.long(), reduction="none"), (logits.argmax(-1) == tgt_id).float()

    def marks_loss(self, logits, marks):
        """(class, column and line losses, share of characters found)"""
        out = []
        for part, lab in zip(logits.float().split(CUT, -1), (marks[:, 1], marks[:, 2], marks[:, 3])):
            known = (lab >= 0).float()
            each = F.cross_entropy(part, lab.long().clamp(min=0), reduction="none")
            out.append((each * known).sum() / known.sum().clamp(min=1))
        char = ((marks[:, 1] > 0) & (marks[:, 2] >= 0)).float()
        hit = (logits[:, :CUT[0]].argmax(-1) == marks[:, 1]).float()
        return out, (hit * char).sum() / char.sum().clamp(min=1)

    def forward(self, b):
        """b: a step's tensors (see data.fields). Returns a dict of losses and measures."""
        w = self.w
        e = "model.vision_tower.embeddings."
        x = self.normalise(b["tiles"], b["sigma"], self.mean, self.std)
        x = F.linear(x, w[e + "patch_embeddings.projection.weight"].flatten(1), w[e + "patch_embeddings.projection.bias"])
        x = torch.cat([w[e + "cls_token"].expand(x.shape[0], -1, -1), x], 1) + w[e + "position_embeddings"]
        for i in range(V["layers"]):
            p = VT % i
            g = lambda *names: [w[p + n] for n in names]
            x = self.vision_layer(x, *g("layernorm_before.weight", "layernorm_before.bias", "qkv.weight", "qkv.bias",
                                        "attention.projection_layer.weight", "attention.projection_layer.bias", "lambda_1",
                                        "layernorm_after.weight", "layernorm_after.bias", "mlp.fc1.weight", "mlp.fc1.bias",
                                        "mlp.fc2.weight", "mlp.fc2.bias", "lambda_2"))
        x = x[:, 1:]
        p = "model.multi_modal_projector."
        vis = self.projector(x, *[w[p + n] for n in ("layer_norm.weight", "layer_norm.bias", "linear_1.weight", "linear_1.bias",
                                                     "linear_2.weight", "linear_2.bias")]).flatten(0, 1)
        marks = b["marks"]
        half = marks[:, 0]
        tile, row, col = half // 512, half % 512 // 32, half % 32
        feat = x.flatten(0, 1).index_select(0, tile * 256 + row * 16 + col // 2)
        lv = F.linear(feat, w["aux_v.weight"], w["aux_v.bias"]).view(-1, 2, CLASSES)
        lv = torch.where((col % 2 == 0)[:, None], lv[:, 0], lv[:, 1])
        feat = vis.index_select(0, tile * 64 + row // 2 * 8 + col // 4)
        sub = (row % 2 * 4 + col % 4).long()[:, None, None].expand(-1, 1, CLASSES)
        lp = F.linear(feat, w["aux_p.weight"], w["aux_p.bias"]).view(-1, 8, CLASSES).gather(1, sub)[:, 0]
        (cls_v, col_v, line_v), hit_v = self.marks_loss(lv, marks)
        (cls_p, col_p, line_p), hit_p = self.marks_loss(lp, marks)

        emb = w["model.language_model.embed_tokens.weight"]
        x = (b["ids"][:, None] == self.vocab).to(emb.dtype) @ emb
        x = x.index_copy(0, b["vis_at"].long(), vis)
        pos = b["pos"].long()
        cos, sin = self.cos[pos], self.sin[pos]
        look = 0.0
        for i in range(L["layers"]):
            p = LT % i
            q, k, v = self.before(x, cos, sin, w[p + "input_layernorm.weight"], w[p + "self_attn.q_proj.weight"],
                                  w[p + "self_attn.q_proj.bias"], w[p + "kv.weight"], w[p + "kv.bias"])
            if i in LOOK_LAYERS:
                look = look + self.look_loss(q[:, 0], k[:, 0], b["look"], b["look_to"], b["look_w"], b["cands"])
            y = self.attention(q, k, v, b["bounds"], data.LONGEST)
            x = self.after(x, y, w[p + "self_attn.o_proj.weight"], w[p + "post_attention_layernorm.weight"],
                           w[p + "gate_up.weight"], w[p + "mlp.down_proj.weight"])
        each, hit = self.final(x, w["model.language_model.norm.weight"], emb, b["tgt"], b["tgt_id"])
        loss = (each * b["tgt_w"]).sum() / b["tgt_w"].sum()
        return {"loss": loss, "each": each, "hit": hit, "class": cls_v + cls_p, "place": col_v + col_p + line_v + line_p, "look": look,
                "chars": hit_v, "chars_p": hit_p}


def initial_state(seed=1):
    """State dict of a fresh network with the training-only heads."""
    torch.manual_seed(seed)
    state = {k: v.detach().clone() for k, v in TinyInternVL().state_dict().items()}
    add_heads(state)
    return state


def add_heads(state):
    for name, width, parts in (("aux_v", V["hidden"], 2), ("aux_p", L["hidden"], 8)):
        state[name + ".weight"] = torch.randn(parts * CLASSES, width) * 0.02
        state[name + ".bias"] = torch.zeros(parts * CLASSES)
