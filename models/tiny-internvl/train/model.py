"""The network, written plainly: for evaluation, quantisation and reference outputs (fast.py trains it). Parameter names equal those of
transformers' InternVLForConditionalGeneration, so a state dict moves over as it is.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

VISION = dict(hidden=256, layers=6, heads=4, mlp=1024, image=224, patch=14, eps=1e-6)
TEXT = dict(hidden=384, layers=6, heads=6, kv_heads=2, mlp=1024, vocab=384, theta=10000.0, eps=1e-6, positions=8192)


def repeat_kv(x, n):
    return x if n == 1 else x.repeat_interleave(n, dim=1)


class VisionAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c["hidden"]
        self.heads = c["heads"]
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(h, h), nn.Linear(h, h), nn.Linear(h, h)
        self.projection_layer = nn.Linear(h, h)

    def forward(self, x):
        b, n, h = x.shape
        w = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        q, k, v = F.linear(x, w, bias).view(b, n, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.projection_layer(y.transpose(1, 2).reshape(b, n, h))


class VisionMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c["hidden"], c["mlp"]), nn.Linear(c["mlp"], c["hidden"])

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.mlp = VisionAttention(c), VisionMLP(c)
        self.layernorm_before = nn.LayerNorm(c["hidden"], eps=c["eps"])
        self.layernorm_after = nn.LayerNorm(c["hidden"], eps=c["eps"])
        self.lambda_1 = nn.Parameter(torch.ones(c["hidden"]))
        self.lambda_2 = nn.Parameter(torch.ones(c["hidden"]))

    def forward(self, x):
        x = x + self.lambda_1 * self.attention(self.layernorm_before(x))
        return x + self.lambda_2 * self.mlp(self.layernorm_after(x))


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        n = (c["image"] // c["patch"]) ** 2
        self.embeddings = nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, c["hidden"]))
        self.embeddings.position_embeddings = nn.Parameter(torch.zeros(1, n + 1, c["hidden"]))
        self.embeddings.patch_embeddings = nn.Module()
        self.embeddings.patch_embeddings.projection = nn.Conv2d(3, c["hidden"], c["patch"], c["patch"])
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(VisionLayer(c) for _ in range(c["layers"]))

    def forward(self, pixels):
        """[T, 3, 224, 224] -> [T, 256, hidden] (without the class token)."""
        p = self.embeddings.patch_embeddings.projection
        t, ch, hh, ww = pixels.shape
        s = p.kernel_size[0]
        x = pixels.view(t, ch, hh // s, s, ww // s, s).permute(0, 2, 4, 1, 3, 5).reshape(t, -1, ch * s * s)
        x = F.linear(x, p.weight.flatten(1), p.bias)
        x = torch.cat([self.embeddings.cls_token.to(x.dtype).expand(t, -1, -1), x], 1)
        x = x + self.embeddings.position_embeddings
        for layer in self.encoder.layer:
            x = layer(x)
        return x[:, 1:]


class Projector(nn.Module):
    def __init__(self, v, t):
        super().__init__()
        self.layer_norm = nn.LayerNorm(4 * v["hidden"])
        self.linear_1 = nn.Linear(4 * v["hidden"], t["hidden"])
        self.linear_2 = nn.Linear(t["hidden"], t["hidden"])

    def forward(self, x):
        t, n, h = x.shape
        g = int(n ** 0.5)
        x = x.view(t, g // 2, 2, g // 2, 2, h).permute(0, 1, 3, 2, 4, 5).reshape(t, n // 4, 4 * h)
        return self.linear_2(F.gelu(self.linear_1(self.layer_norm(x))))


class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        f = x.float()
        return self.weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class TextAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c["hidden"]
        self.heads, self.kv, self.dim = c["heads"], c["kv_heads"], h // c["heads"]
        self.q_proj = nn.Linear(h, h)
        self.k_proj, self.v_proj = nn.Linear(h, self.kv * self.dim), nn.Linear(h, self.kv * self.dim)
        self.o_proj = nn.Linear(h, h, bias=False)

    def forward(self, x, cos, sin):
        b, n, h = x.shape
        w = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        qkv = F.linear(x, w, bias).view(b, n, self.heads + 2 * self.kv, self.dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv, self.kv], 1)
        rot = lambda y: torch.cat([-y[..., self.dim // 2:], y[..., :self.dim // 2]], -1)
        q = (q * cos + rot(q) * sin).to(v.dtype)
        k = (k * cos + rot(k) * sin).to(v.dtype)
        g = self.heads // self.kv
        y = F.scaled_dot_product_attention(q, repeat_kv(k, g), repeat_kv(v, g), is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, h))


class TextMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden"], c["mlp"], bias=False)
        self.up_proj = nn.Linear(c["hidden"], c["mlp"], bias=False)
        self.down_proj = nn.Linear(c["mlp"], c["hidden"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = TextAttention(c), TextMLP(c)
        self.input_layernorm = RMSNorm(c["hidden"], c["eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden"], c["eps"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab"], c["hidden"])
        self.layers = nn.ModuleList(TextLayer(c) for _ in range(c["layers"]))
        self.norm = RMSNorm(c["hidden"], c["eps"])
        d = c["hidden"] // c["heads"]
        inv = 1.0 / c["theta"] ** (torch.arange(0, d, 2).float() / d)
        f = torch.outer(torch.arange(c["positions"]).float(), inv)
        f = torch.cat([f, f], -1)
        self.register_buffer("cos", f.cos(), persistent=False)
        self.register_buffer("sin", f.sin(), persistent=False)

    def forward(self, x):
        cos, sin = self.cos[:x.shape[1]], self.sin[:x.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class TinyInternVL(nn.Module):
    def __init__(self, vision=VISION, text=TEXT):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = VisionTower(vision)
        self.model.multi_modal_projector = Projector(vision, text)
        self.model.language_model = TextModel(text)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight")):
                    std = 0.02 / (2 * 7) ** 0.5
                elif "projector" in name or "patch_embeddings" in name:
                    std = 0.03
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        # positions start as strong two-dimensional sines, or they drown in the patch content and reading order is never found
        g, h = vision["image"] // vision["patch"], vision["hidden"]
        freq = 1.0 / 50.0 ** (torch.arange(h // 4).float() / (h // 4))
        line = torch.arange(g).float()[:, None] * freq
        line = torch.cat([line.sin(), line.cos()], 1)                                   # [g, h / 2]
        pos = torch.cat([line[:, None].expand(g, g, h // 2), line[None].expand(g, g, h // 2)], 2).reshape(g * g, h)
        with torch.no_grad():
            self.model.vision_tower.embeddings.position_embeddings[0, 1:] = 0.7 * pos

    def embed(self, ids, vision_tokens=None, image_token=None):
        """Token embeddings [B, L, H]; image positions take the vision tokens in order."""
        x = self.model.language_model.embed_tokens(ids)
        if vision_tokens is not None:
            at = (ids.view(-1) == image_token).nonzero().squeeze(1)
            flat = x.reshape(-1, x.shape[-1]).to(vision_tokens.dtype)
            x = flat.index_copy(0, at, vision_tokens.reshape(-1, flat.shape[-1])).view(*ids.shape, -1)
        return x

    def logits(self, hidden):
        return F.linear(hidden, self.model.language_model.embed_tokens.weight)
