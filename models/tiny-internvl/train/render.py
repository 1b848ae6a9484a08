"""Draws the synthetic pages: text, receipts, bar charts and shape scenes.

Every page knows where each character stands and which character of the full text it is. `page_marks` turns that into
labels of half patches (7 x 14 px) for the auxiliary heads, `char_cells` into the image token that holds each character
for the attention loss. Both exist only during training.
"""
import functools
import glob
import io
import math
import os
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from preprocess import TILE

COLOURS = {"red": (214, 32, 36), "green": (34, 150, 60), "blue": (36, 70, 210), "yellow": (245, 215, 30),
           "orange": (245, 135, 20), "purple": (130, 40, 160), "pink": (245, 130, 180), "brown": (120, 72, 30),
           "black": (18, 18, 18)}
COLOUR_NAMES = list(COLOURS)
SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross"]
PLACES = ["in the top left", "at the top", "in the top right", "on the left", "in the center", "on the right",
          "in the bottom left", "at the bottom", "in the bottom right"]
N_CLASS = 96 + len(SHAPES) * len(COLOURS)    # none, 95 printable characters, shape x colour
N_COLUMN, N_LINE = 48, 12                    # place of a character in its line and of the line, both counted in one tile
SIDE = TILE // 14                            # patches along a tile
IGNORE = -100
SHAPE_PLACE = 100000                         # char_cells knows the k-th shape or bar as SHAPE_PLACE + k
LEGIBLE = 9.5                                # px of font size in a tile under which nobody is asked to read
SIZES = sorted({round(9 * 1.085 ** k) for k in range(34)})          # font sizes are drawn from these (9 to 130 px)
ODD_FACES = re.compile(r"Hairline|Thin|Black|Heavy|ExtraLight|MathTeX|LightItalic|CondLight")


def find_fonts(*dirs):
    fonts = sorted(p for d in dirs for p in glob.glob(os.path.join(d, "**", "*.ttf"), recursive=True))
    fonts = [f for f in fonts if not ODD_FACES.search(os.path.basename(f))]
    if not fonts:
        raise SystemExit("no .ttf fonts found in %s" % (dirs,))
    return fonts


@functools.lru_cache(maxsize=3000)
def font(path, size):
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=400000)
def char_width(path, size, ch):
    return font(path, size).getlength(ch)


@functools.lru_cache(maxsize=400000)
def glyph(path, size, ch):
    """(bitmap, its offset from the pen): drawing letter by letter is several times faster than FreeType each time."""
    return font(path, size).getmask2(ch, "L", anchor="ls")


def text_width(path, size, text):
    return sum([char_width(path, size, c) for c in text])


def near_size(size):
    """The largest of SIZES that is not above `size`."""
    best = SIZES[0]
    for s in SIZES:
        if s > size:
            break
        best = s
    return best


class Page:
    """A picture plus what is on it."""

    def __init__(self, image):
        self.image = image
        self.chars = []        # (x, y, character, height)
        self.order = []        # index of each character in the whole text (spaces and line ends counted)
        self.line_of = []      # number of its line
        self.offset = 0
        self.lines = 0
        self.shapes = []       # (kind, colour, place index, cx, cy, radius)
        self.bars = []         # (colour, left, top, right, bottom)
        self.sigma = 0.0       # noise to add on the GPU, in levels of 255

    def add_line(self, draw, text, x, baseline, path, size, fill, same_line=False):
        """Draws `text`; returns the index of its first character in the whole text."""
        whole = len(text) % 7 == 0                          # with kerning; the other lines from stored glyphs
        ink = draw._getink(fill)[0]
        if whole:
            draw.text((x, baseline), text, font=font(path, size), fill=fill, anchor="ls")
        y = baseline - 0.34 * size
        base = round(baseline)
        start = self.offset
        line = self.lines - 1 if same_line else self.lines
        for i, c in enumerate(text):
            w = char_width(path, size, c)
            if c != " ":
                if not whole:
                    mask, (dx, dy) = glyph(path, size, c)
                    draw.draw.draw_bitmap((round(x) + dx, base + dy), mask, ink)
                self.chars.append((x + 0.5 * w, y, c, size))
                self.order.append(start + i)
                self.line_of.append(line)
            x += w
        self.offset += len(text) + 1
        self.lines = line + 1
        return start


class Renderer:
    def __init__(self, rng, textgen, fonts):
        self.r = rng
        self.tg = textgen
        self.fonts = fonts
        self.plain = 0.0       # share of pages in black on white

    # ---- colours and backgrounds ----------------------------------------
    def palette(self):
        """(background, text colour) with enough contrast."""
        r = self.r
        if r.random() < self.plain:
            return (255, 255, 255), (0, 0, 0)
        x = r.random()
        if x < 0.35:
            bg = (255, 255, 255)
        elif x < 0.6:
            b = r.randint(215, 250)
            bg = tuple(max(0, min(255, b + r.randint(-18, 18))) for _ in range(3))
        elif x < 0.8:
            bg = tuple(r.randint(0, 70) for _ in range(3))
        else:
            bg = tuple(r.randint(0, 255) for _ in range(3))
        lum = lambda c: 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2]
        if r.random() < 0.5:
            fg = (0, 0, 0) if lum(bg) > 127 else (255, 255, 255)
            if abs(lum(fg) - lum(bg)) > 90:
                return bg, fg
        for _ in range(30):
            fg = tuple(r.randint(0, 255) for _ in range(3))
            if abs(lum(fg) - lum(bg)) > 90:
                return bg, fg
        return (255, 255, 255), (0, 0, 0)

    def canvas(self, w, h, bg):
        r = self.r
        if r.random() < 0.10:
            g = Image.new("RGB", (2, 2))
            for i in range(4):
                g.putpixel((i % 2, i // 2), tuple(max(0, min(255, c + r.randint(-22, 22))) for c in bg))
            return g.resize((w, h), Image.BILINEAR)
        return Image.new("RGB", (w, h), bg)

    def degrade(self, page, strength=1.0, rotate=True, legible=0.06 * TILE):
        """Slight rotation, blur, JPEG, noise; the character positions follow the rotation."""
        r = self.r
        im = page.image
        if im.width * im.height > 200000:                            # the dear ones more rarely on large canvases
            strength *= 0.25
        if rotate and r.random() < 0.12 * strength:
            deg = r.uniform(-3, 3)
            im = im.rotate(deg, Image.BILINEAR, fillcolor=im.getpixel((1, 1)))
            a = math.radians(deg)
            ca, sa = math.cos(a), math.sin(a)
            cx, cy = im.width / 2, im.height / 2
            page.chars = [(cx + ca * (x - cx) + sa * (y - cy), cy - sa * (x - cx) + ca * (y - cy), c, s)
                          for x, y, c, s in page.chars]
        small = min((c[3] for c in page.chars), default=99) < legible
        if not small and r.random() < 0.08 * strength:
            im = im.filter(ImageFilter.GaussianBlur(r.uniform(0.4, 1.1)))
        if r.random() < 0.06 * strength:
            buf = io.BytesIO()
            im.save(buf, "JPEG", quality=r.randint(50, 92))
            im = Image.open(buf).convert("RGB")
        if r.random() < 0.25 * strength:
            page.sigma = r.uniform(2, 14)
        page.image = im
        return page

    def open_page(self, w, h):
        """An empty page with what is drawn on it: (page, draw, font path, colour of the text)."""
        bg, fg = self.palette()
        page = Page(self.canvas(w, h, bg))
        return page, ImageDraw.Draw(page.image), self.r.choice(self.fonts), fg

    # ---- text pages ------------------------------------------------------
    def fit_line(self, path, size, max_w, words):
        for _ in range(4):
            t = self.tg.line(words)
            while text_width(path, size, t) > max_w and " " in t:
                t = t.rsplit(" ", 1)[0]
            t = t.strip()
            if t and text_width(path, size, t) <= max_w:
                return t
            words = max(1, words - 1)
        while len(t) > 1 and text_width(path, size, t) > max_w:
            t = t[:-1]
        return t.strip() or "a"

    def text_page(self, w, h, lines, size, words=None, strength=1.0):
        """A page with up to `lines` lines of font size `size`; returns (page, list of lines)."""
        r = self.r
        page, draw, path, fg = self.open_page(w, h)
        size = near_size(size)
        lead = r.uniform(1.15, 1.9)
        mx = max(3, int(w * r.uniform(0.02, 0.08)))
        my = max(3, int(h * 0.03))
        lines = max(1, min(lines, int((h - 2 * my - size * 0.4) / (size * lead)) + 1))
        if r.random() < 0.08:
            draw.rectangle((mx // 2, my // 2, w - mx // 2 - 1, h - my // 2 - 1), outline=fg, width=r.choice((1, 2, 3)))
        block = size * lead * (lines - 1) + size
        y = my + size * 0.85 + r.random() * max(0.0, h - 2 * my - block - size * 0.2)
        align = r.choice(("left", "left", "center", "right", "free"))
        out = []
        max_w = w - 2 * mx
        cap = max(1, int(max_w / (size * 0.55 * 6)))
        for _ in range(lines):
            t = self.fit_line(path, size, max_w, words or r.randint(1, max(1, min(7, cap))))
            free = max(0, max_w - text_width(path, size, t))
            x = mx + {"left": 0, "center": free / 2, "right": free, "free": free * r.random()}[align]
            page.add_line(draw, t, x, y, path, size, fg)
            if r.random() < 0.03:
                draw.line((x, y + size * 0.2, x + text_width(path, size, t), y + size * 0.2), fill=fg, width=max(1, size // 16))
            out.append(t)
            y += size * lead
        return self.degrade(page, strength, legible=0.06 * min(w, h)), out

    def sign_page(self, w, h, strength=1.0):
        """One to three short lines as large as they fit, or somewhat smaller."""
        r = self.r
        page, draw, path, fg = self.open_page(w, h)
        out = [self.tg.line(r.choice((1, 1, 2, 2, 3)))[:22].strip() or "a" for _ in range(r.choice((1, 1, 1, 2, 2, 3)))]
        widest = max(text_width(path, 48, t) for t in out)
        fit = min(48 * 0.92 * w / widest, h / (len(out) * 1.4))
        size = near_size(max(11, fit * r.uniform(0.5, 1.0)))
        lead = size * r.uniform(1.1, 1.35)
        y = (h - lead * (len(out) - 1)) / 2 + size * 0.35 + r.uniform(-0.1, 0.1) * size
        for t in out:
            page.add_line(draw, t, (w - text_width(path, size, t)) / 2, y, path, size, fg)
            y += lead
        return self.degrade(page, strength, legible=0.06 * min(w, h)), out

    def receipt_page(self, w, h, rows, size):
        """Rows 'item price', often with a total; returns (page, lines, items); items = [(name, price, index of the price)],
        the total last under the name None (price None where there is none)."""
        r = self.r
        page, draw, path, fg = self.open_page(w, h)
        size = near_size(size)
        lead = r.uniform(1.2, 1.7)
        rows = max(2, min(rows, int((h - size) / (size * lead)) - 2))
        names, prices = self.tg.receipt(rows)
        cur = r.choice(("", "", "$"))
        case = r.choice((str, str.capitalize, str.capitalize, str.upper))
        body = [(case(n), "%s%.2f" % (cur, p / 100)) for n, p in zip(names, prices)]
        has_total = r.random() < 0.75
        if has_total:
            body.append((case("total"), "%s%.2f" % (cur, sum(prices) / 100)))
        head = case(r.choice(("receipt", "receipt", "invoice", "bill", "menu"))) if r.random() < 0.4 else None
        need = max(text_width(path, size, a) + text_width(path, size, b) + size for a, b in body)
        if need > w * 0.94:
            size = near_size(max(11, int(size * w * 0.94 / need)))
        tw = lambda t: text_width(path, size, t)
        x0 = w * r.uniform(0.03, 0.1)
        if r.random() < 0.25:                                        # prices right behind the names, as in plain text
            x1 = None
        else:
            x1 = min(w * 0.97, max(x0 + max(tw(a) + tw(b) for a, b in body) + size, w * r.uniform(0.6, 0.95)))
        n = len(body) + (head is not None)
        y = size + r.random() * max(0.0, h - n * size * lead - size * 0.6)
        lines, items = [], []
        if head:
            page.add_line(draw, head, x0 + r.random() * 0.5 * max(0, (x1 or w) - x0 - tw(head)), y, path, size, fg)
            lines.append(head)
            y += size * lead
        for (a, b), name in zip(body, names + [None]):
            page.add_line(draw, a, x0, y, path, size, fg)
            at = page.add_line(draw, b, x0 + tw(a + " ") if x1 is None else x1 - tw(b), y, path, size, fg, same_line=True)
            lines.append(a + " " + b)
            items.append((name, b, at))
            y += size * lead
        if not has_total:
            items.append((None, None, None))
        return self.degrade(page, 0.8, legible=0.06 * min(w, h)), lines, items

    # ---- bar charts ------------------------------------------------------
    def chart_page(self, w, h):
        """Upright bars with names below and values above; returns (page, [(name, colour, value, index of the value, index of the name)])."""
        r = self.r
        bg = (255, 255, 255) if r.random() < 0.6 else tuple(r.randint(232, 255) for _ in range(3))
        page = Page(self.canvas(w, h, bg))
        draw = ImageDraw.Draw(page.image)
        path = r.choice(self.fonts)
        n = r.randint(2, 5)
        names = self.tg.bar_names(n)
        colours = r.sample(COLOUR_NAMES, n)
        values = r.sample(range(4, 61), n)
        slot = w / n
        size = min(h * 0.10, *(slot * 0.92 / max(1.0, text_width(path, 40, t) / 40) for t in names))
        size = near_size(max(10, size))
        base, top = h - size * 1.6, size * 1.7
        bars = []
        tall = max(values)
        for i, (name, colour, v) in enumerate(zip(names, colours, values)):
            cx = slot * (i + 0.5)
            half = slot * r.uniform(0.26, 0.34)
            y = base - (base - top) * v / tall
            j = 12
            fill = tuple(max(0, min(255, c + r.randint(-j, j))) for c in COLOURS[colour])
            draw.rectangle((cx - half, y, cx + half, base), fill=fill)
            page.bars.append((colour, cx - half, y, cx + half, base))
            bars.append([name, colour, v, cx, y])
        draw.line((0, base, w, base), fill=(60, 60, 60), width=max(1, int(h / 150)))
        out = []
        for name, colour, v, cx, y in bars:
            name_at = page.add_line(draw, name, cx - text_width(path, size, name) / 2, base + size * 1.1, path, size, (20, 20, 20))
            t = str(v)
            at = page.add_line(draw, t, cx - text_width(path, size, t) / 2, y - size * 0.2, path, size, (20, 20, 20), same_line=True)
            out.append((name, colour, v, at, name_at))
        return self.degrade(page, 0.6, rotate=False), out

    # ---- shape scenes ----------------------------------------------------
    @staticmethod
    def outline(kind, cx, cy, rad):
        if kind == "square":
            k = rad * 0.86
            return [(cx - k, cy - k), (cx + k, cy - k), (cx + k, cy + k), (cx - k, cy + k)]
        if kind == "triangle":
            return [(cx, cy - rad), (cx + rad * 0.95, cy + rad * 0.8), (cx - rad * 0.95, cy + rad * 0.8)]
        if kind == "diamond":
            return [(cx, cy - rad), (cx + rad * 0.72, cy), (cx, cy + rad), (cx - rad * 0.72, cy)]
        if kind == "star":
            return [(cx + (rad if i % 2 == 0 else rad * 0.42) * math.sin(i * math.pi / 5),
                     cy - (rad if i % 2 == 0 else rad * 0.42) * math.cos(i * math.pi / 5)) for i in range(10)]
        a, b = rad * 0.32, rad * 0.95
        return [(cx - a, cy - b), (cx + a, cy - b), (cx + a, cy - a), (cx + b, cy - a), (cx + b, cy + a), (cx + a, cy + a),
                (cx + a, cy + b), (cx - a, cy + b), (cx - a, cy + a), (cx - b, cy + a), (cx - b, cy - a), (cx - a, cy - a)]

    @classmethod
    def draw_shape(cls, draw, kind, cx, cy, rad, fill):
        if kind == "circle":
            draw.ellipse((cx - rad * 0.93, cy - rad * 0.93, cx + rad * 0.93, cy + rad * 0.93), fill=fill)
        else:
            draw.polygon(cls.outline(kind, cx, cy, rad), fill=fill)

    def scene(self, w, h, n, cells=None, caption=None):
        """`n` shapes in cells of a 3 x 3 grid; `caption` puts a text line in the bottom third. Returns (page, line or None)."""
        r = self.r
        bg = (255, 255, 255) if r.random() < 0.5 else tuple(r.randint(222, 255) for _ in range(3))
        page = Page(self.canvas(w, h, bg))
        draw = ImageDraw.Draw(page.image)
        cells = sorted(r.sample(list(cells or range(9)), n))
        unit = min(w, h) / 6
        radii = [unit * r.uniform(0.35, 0.66) for _ in cells]
        if n > 1 or r.random() < 0.5:
            radii[r.randrange(n)] = unit * r.uniform(0.86, 1.0)      # one clearly largest shape
        few = [r.choice(SHAPES) for _ in range(2)], [r.choice(COLOUR_NAMES) for _ in range(2)]
        repeat = r.random() < 0.4                                    # make equal shapes likely
        for cell, rad in zip(cells, radii):
            kind = r.choice(few[0] if repeat else SHAPES)
            colour = r.choice(few[1] if repeat else COLOUR_NAMES)
            cx = w * (2 * (cell % 3) + 1) / 6 + r.uniform(-1, 1) * max(0, min(w / 6 - rad, w * 0.07))
            cy = h * (2 * (cell // 3) + 1) / 6 + r.uniform(-1, 1) * max(0, min(h / 6 - rad, h * 0.07))
            j = 20 if colour not in ("orange", "yellow", "brown", "red") else 10
            fill = tuple(max(0, min(255, c + r.randint(-j, j))) for c in COLOURS[colour])
            self.draw_shape(draw, kind, cx, cy, rad, fill)
            page.shapes.append((kind, colour, cell, cx, cy, rad))
        line = None
        if caption:
            path = r.choice(self.fonts)
            size = near_size(max(12, int(h * r.uniform(0.07, 0.12))))
            line = self.fit_line(path, size, w * 0.92, r.randint(1, 3))
            x = w * 0.04 + r.random() * (w * 0.92 - text_width(path, size, line))
            page.add_line(draw, line, x, h * r.uniform(0.82, 0.94), path, size, (10, 10, 10))
        return self.degrade(page, 0.6, rotate=False), line


def _views(page, grid):
    """(columns, rows, x scale, y scale, first tile) of the tiled picture and of the thumbnail."""
    c, r = grid
    w, h = page.image.size
    out = [(c, r, c * TILE / w, r * TILE / h, 0)]
    if c * r > 1:
        out.append((1, 1, TILE / w, TILE / h, c * r))
    return out


def char_cells(page, grid):
    """Image token of each character: {index in the text: (token in the tiles, token in the thumbnail or the same)}.
    Tokens count from the first of the picture."""
    things = [(x, y, size) for x, y, _, size in page.chars] + [(s[3], s[4], 1e9) for s in page.shapes] + \
        [((b[1] + b[3]) / 2, max((b[2] + b[4]) / 2, b[4] - page.image.height / 9), 1e9) for b in page.bars]
    if not things:
        return {}
    order = page.order + [SHAPE_PLACE + k for k in range(len(page.shapes) + len(page.bars))]
    x, y, size = np.array(things).T
    found = []
    for c, r, sx, sy, first in _views(page, grid):
        gx = np.clip(x * sx, 0, c * TILE - 1).astype(np.int64)
        gy = np.clip(y * sy, 0, r * TILE - 1).astype(np.int64)
        tile = first + gy // TILE * c + gx // TILE
        found.append(tile * 64 + gy % TILE // 28 * 8 + gx % TILE // 28)
        if first:
            found[1] = np.where(size * min(sx, sy) >= LEGIBLE, found[1], found[0])
    return {o: (a, b) for o, a, b in zip(order, found[0].tolist(), found[-1].tolist())}


def page_marks(page, grid, rng, nothing=14, inside=30):
    """Labels of half patches: int32 [k, 4] of (half patch, class, column, line); half patches count 512 a tile, row by row.
    All characters are there, and a few random places without any and inside shapes."""
    out = []
    tiles = grid[0] * grid[1]
    for c, r, sx, sy, first in _views(page, grid):
        if page.shapes or page.bars:
            m = Image.new("L", (c * SIDE, r * SIDE), 0)
            d = ImageDraw.Draw(m)
            for kind, colour, _, cx, cy, rad in page.shapes:
                v = 96 + SHAPES.index(kind) * len(COLOURS) + COLOUR_NAMES.index(colour)
                if kind == "circle":
                    q = rad * .93
                    x0, y0 = round((cx - q) * sx / 14), round((cy - q) * sy / 14)
                    d.ellipse((x0, y0, max(x0, round((cx + q) * sx / 14) - 1), max(y0, round((cy + q) * sy / 14) - 1)), fill=v)
                else:
                    d.polygon([(px * sx / 14 - .5, py * sy / 14 - .5) for px, py in Renderer.outline(kind, cx, cy, rad)], fill=v)
            for colour, left, top, right, bottom in page.bars:           # a bar counts as a square
                v = 96 + SHAPES.index("square") * len(COLOURS) + COLOUR_NAMES.index(colour)
                d.rectangle((left * sx / 14, top * sy / 14, right * sx / 14 - 1, max(top * sy / 14, bottom * sy / 14 - 1)), fill=v)
            m = np.asarray(m)
            i, j = np.nonzero(m)
            if len(i) > inside * (tiles if not first else 1):
                keep = rng.choice(len(i), inside * (tiles if not first else 1), replace=False)
                i, j = i[keep], j[keep]
            half = (first + i // SIDE * c + j // SIDE) * 512 + i % SIDE * 32 + j % SIDE * 2 + (i + j) % 2
            lab = m[i, j].astype(np.int64)
            ign = np.full(len(i), IGNORE)
            out.append(np.stack([half, lab, ign, ign], 1))
        taken = np.zeros(c * r * 512, bool)
        if page.chars:
            x, y, ch, size = zip(*page.chars)
            gx, gy, size = np.array(x) * sx, np.array(y) * sy, np.array(size)
            ok = (gx >= 0) & (gx < c * TILE) & (gy >= 0) & (gy < r * TILE)
            lab = np.array([ord(k) - 31 for k in ch])
            order, line = np.array(page.order), np.array(page.line_of)
            gx, gy, lab, order, line, size = gx[ok].astype(np.int64), gy[ok].astype(np.int64), lab[ok], order[ok], line[ok], size[ok]
            tile = gy // TILE * c + gx // TILE
            half = tile * 512 + gy % TILE // 14 * 32 + gx % TILE // 7
            taken[half] = True
            if len(half) and size[0] * min(sx, sy) >= LEGIBLE:
                key, group = np.unique(tile * 4096 + line, return_inverse=True)
                least = np.full(len(key), 1 << 30)
                np.minimum.at(least, group, order)
                column = order - least[group]
                owner = key // 4096
                rank = np.arange(len(key)) - np.searchsorted(owner, owner)
                line = rank[group]
                column = np.where(column < N_COLUMN, column, IGNORE)
                line = np.where(line < N_LINE, line, IGNORE)
                out.append(np.stack([first * 512 + half, lab, column, line], 1))
        if not page.shapes:
            some = rng.integers(0, c * r * 512, nothing * c * r)
            some = some[~taken[some]]
            ign = np.full(len(some), IGNORE)
            out.append(np.stack([first * 512 + some, np.zeros(len(some), np.int64), ign, ign], 1))
    return np.concatenate(out).astype(np.int32) if out else np.zeros((0, 4), np.int32)
