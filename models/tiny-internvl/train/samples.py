"""Turns pages and text into ChatML conversations, and conversations into token examples with everything the losses need."""
import json
import os
import random

import numpy as np

from preprocess import TILE, choose_grid, tiles_of
from render import COLOUR_NAMES, PLACES, SHAPE_PLACE, SHAPES, Renderer, char_cells, page_marks
from textgen import NO_IMAGE, TextGen

TILE_TOKENS = 64
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
TOKENIZER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tokenizer.json")
IMAGE = object()                      # marks an image inside the list of parts of a message
TASKS = ["line", "lines", "multi", "receipt", "scene", "chart", "sum", "chat"]

ASK_TEXT = ["Read the text in the image."] * 6 + [
    "What does the text say?", "Transcribe the text in the image.", "What is written in the image?", "Read the text.",
    "What text is in the image?", "OCR the image.", "Extract the text from the image.", "What does the image say?",
    "What does it say?", "What does the sign say?", "Read this.", "Read the receipt.", "Read the screenshot.", "Transcribe this image."]
ASK_SCENE = ["Describe the image."] * 6 + ["Describe this image.", "What is in the image?", "What do you see in the image?",
                                          "Describe the picture.", "Please describe the image.", "What do you see?"]
ASK_TOTAL = ["What is the total?", "What is the total?", "How much is the total?", "What is the total price?", "What does it cost in total?"]
NO_TEXT = "There is no text in the image."
NO_TOTAL = "There is no total in the image."


def plural(n, noun):
    return noun if n == 1 else ("crosses" if noun.endswith("cross") else noun + "s")


def a(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(shapes):
    parts = ["%s %s" % (a("%s %s" % (c, k)), PLACES[p]) for k, c, p, *_ in shapes]
    return "There is 1 shape: %s." % parts[0] if len(parts) == 1 else "There are %d shapes: %s." % (len(parts), join(parts))


def caption_looks(text, shapes):
    """Where to look for each letter of "red circle" in a caption."""
    out, at = {}, 0
    for k, s in enumerate(shapes):
        name = "%s %s" % (s[1], s[0])
        at = text.index(name, at)
        out.update({at + i: SHAPE_PLACE + k for i in range(len(name))})
        at += len(name)
    return out


def answer_looks(q, ans, shapes):
    """The same for an answer that names one shape or its colour, where that can only be one shape."""
    fits = [k for k, s in enumerate(shapes) if ans == a("%s %s" % (s[1], s[0])) and ("largest" in q or PLACES[s[2]] in q)
            or ans == s[1] and (s[0] in q or "largest" in q)]
    if "largest" in q and len(fits) > 1:
        fits = [max(fits, key=lambda k: shapes[k][5])]
    return {i: SHAPE_PLACE + fits[0] for i in range(len(ans))} if len(fits) == 1 else {}


def shape_question(r, shapes, where="", ask_colour="What colour"):
    """(question, answer) about a list of shapes."""
    kinds = [s[0] for s in shapes]
    colours = [s[1] for s in shapes]
    both = ["%s %s" % (s[1], s[0]) for s in shapes]
    x = r.random()
    if x < 0.18:
        n = "%s %s" % (r.choice(COLOUR_NAMES), r.choice(SHAPES)) if r.random() < 0.25 else r.choice(both)
        return "How many %s are there%s?" % (plural(2, n), where), str(both.count(n))
    if x < 0.28:
        n = r.choice(SHAPES) if r.random() < 0.3 else r.choice(kinds)
        return "How many %s are there%s?" % (plural(2, n), where), str(kinds.count(n))
    if x < 0.36:
        n = r.choice(COLOUR_NAMES) if r.random() < 0.3 else r.choice(colours)
        return "How many %s shapes are there%s?" % (n, where), str(colours.count(n))
    if x < 0.44:
        return "How many shapes are there%s?" % where, str(len(shapes))
    if x < 0.62:
        if r.random() < 0.5:
            n = r.choice(both)
        else:
            s = r.choice(shapes)
            n = "%s %s" % ((s[1], r.choice(SHAPES)) if r.random() < 0.5 else (r.choice(COLOUR_NAMES), s[0]))
        return "Is there %s%s?" % (a(n), where), "Yes" if n in both else "No"
    if x < 0.80:
        order = sorted(shapes, key=lambda s: -s[5])
        if len(order) == 1 or order[0][5] > 1.25 * order[1][5]:
            s = order[0]
            if r.random() < 0.5:
                return "%s is the largest shape%s?" % (ask_colour, where), s[1]
            return "What is the largest shape%s?" % where, a("%s %s" % (s[1], s[0]))
    if x < 0.84:
        n = r.choice(SHAPES)
        if n not in kinds:
            return "%s is the %s%s?" % (ask_colour, n, where), "There is no %s in the image." % n
    if x < 0.88:
        p = r.randrange(9)
        if p not in [s[2] for s in shapes]:
            return "What is %s%s?" % (PLACES[p], where), "Nothing."
    s = r.choice(shapes)
    if r.random() < 0.6:
        return "What is %s%s?" % (PLACES[s[2]], where), a("%s %s" % (s[1], s[0]))
    if kinds.count(s[0]) == 1:
        return "%s is the %s%s?" % (ask_colour, s[0], where), s[1]
    return "How many shapes are there%s?" % where, str(len(shapes))


def byte_ids(tokenizer=TOKENIZER):
    """Token id of each of the 256 bytes, and of the special tokens."""
    with open(tokenizer) as f:
        t = json.load(f)
    shown = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))     # bytes that stand for themselves
    other = {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in shown)}
    vocab = t["model"]["vocab"]
    return [vocab[other.get(b, chr(b))] for b in range(256)], {x["content"]: x["id"] for x in t["added_tokens"]}


class Turn:
    """A question and its answer; `look` = {index in the answer: place in the picture `pic` that is to be looked at for it}.
    `src` = (pic, index in the page's text of the character that the answer's character `at` copies) says it for a copied text."""

    def __init__(self, q, ans, task, src=None, at=0, look=None):
        self.q, self.a, self.task = q, ans, task
        self.pic = src[0] if src else 0
        self.look = look or ({at + i: src[1] + i for i in range(len(ans) - at)} if src else {})


class Example:
    """Tokens of one conversation. `ids` int32; `tgt` positions of the predicted tokens, with `weight` and `task`;
    `tiles` uint8 [n, 224, 224, 3]; `image_at` first position of each picture's tokens; `look` [(position that predicts,
    token in the tiles, token in the thumbnail, picture)]; `marks` int32 [k, 4] (see page_marks); `sigma` noise of each tile."""


class Sampler:
    def __init__(self, seed, fonts, held_words=False, tokenizer=TOKENIZER):
        self.r = random.Random(seed)
        self.rng = np.random.default_rng(seed)
        self.tg = TextGen(self.r, held_only=held_words)
        self.rd = Renderer(self.r, self.tg, fonts)
        self.bytes, self.ids = byte_ids(tokenizer)

    # ---- pages -----------------------------------------------------------
    def ocr_page(self, w, h, d, lines=None, tile_px=None):
        """Page of text on a w x h canvas; d in [0, 1] is the difficulty, tile_px the px of a tile side in the canvas."""
        r = self.r
        unit = (tile_px or h) / TILE
        hi = 44 if tile_px is None else 64
        lo = 26 - 12 * min(1.0, d * 1.25)
        size = max(10, unit * lo * (hi / lo) ** (r.random() ** 1.3))
        self.rd.plain = 0.8 - 2 * d
        self.tg.short = 1 + int(28 * d) if d < 0.35 and r.random() < 0.9 - 1.6 * d else 0    # first single letters, then two, ...
        self.tg.random_share = 0.35 if d < 0.6 else 0.2
        strength = max(0.0, min(1.0, d * 2 - 0.4))
        if lines is None:
            lines = 1 if d < 0.2 or r.random() < 0.35 else r.randint(1, 2 if d < 0.5 else 4)
        if d > 0.3 and r.random() < 0.12:
            page, out = self.rd.sign_page(w, h, strength)
        else:
            words = 1 if d < 0.25 else r.randint(1, 2) if d < 0.4 else None
            page, out = self.rd.text_page(w, h, lines, size, words, strength)
        self.tg.short = 0
        return page, out

    def scene(self, w, h, d, cells=None, text=False):
        n = self.r.randint(1, 2 if d < 0.08 else 3 if d < 0.25 else 5)
        if cells:
            n = min(n, len(cells))
        return self.rd.scene(w, h, n, cells, text)

    def read_turns(self, lines, pic=0, task=None):
        """Turns that read a whole page, or say how many lines it has."""
        r = self.r
        text = "\n".join(lines)
        task = task or ("line" if len(lines) == 1 else "lines")
        turns = [Turn(r.choice(ASK_TEXT), text, task, (pic, 0))]
        x = r.random()
        if x < 0.05:
            turns.append(Turn("How many lines of text are there?", str(len(lines)), "lines"))
        elif x < 0.10 and len(lines) > 1:
            turns.append(Turn("Read only the first line.", lines[0], task, (pic, 0)))
        elif x < 0.13 and len(lines) > 1:
            turns.append(Turn("Read only the last line.", lines[-1], task, (pic, len(text) - len(lines[-1]))))
        elif x < 0.17:
            head = "The image shows text: "
            turns[0] = Turn(r.choice(ASK_SCENE), head + text, task, (pic, 0), len(head))
        r.shuffle(turns)
        return turns

    def receipt_turns(self, lines, items, pic=0):
        r = self.r
        turns = [Turn(r.choice(ASK_TEXT), "\n".join(lines), "receipt", (pic, 0))]
        goods, total = items[:-1], items[-1]
        for name, price, at in r.sample(goods, r.choice((1, 1, 2))):
            q = r.choice(("What is the price of the %s?", "How much is the %s?", "What does the %s cost?")) % name
            turns.append(Turn(q, price, "receipt", (pic, at)))
        if total[1] is not None:
            if r.random() < 0.7:
                turns.append(Turn(r.choice(ASK_TOTAL), total[1], "receipt", (pic, total[2])))
        elif r.random() < 0.3:
            turns.append(Turn(r.choice(ASK_TOTAL), NO_TOTAL, "receipt"))
        if r.random() < 0.15:
            turns.append(Turn("How many items are there?", str(len(goods)), "receipt"))
        r.shuffle(turns)
        return turns

    def chart_turns(self, bars, pic=0):
        r = self.r
        turns = []
        full = "A bar chart with %d bars: %s." % (len(bars), join(["%s %d" % (b[0], b[2]) for b in bars]))
        spans, i = {}, full.index(": ") + 2
        for b in bars:
            i = full.index("%s %d" % (b[0], b[2]), i)
            spans.update({i + k: b[4] + k for k in range(len(b[0]))})
            i += len(b[0]) + 1
            spans.update({i + k: b[3] + k for k in range(len(str(b[2])))})
        by = sorted(bars, key=lambda b: b[2])
        for _ in range(r.choice((1, 2, 2, 3))):
            b = r.choice(bars)
            x = r.random()
            if x < 0.25:
                t = Turn(r.choice(ASK_SCENE), full, "chart", (pic, 0), look=spans)
            elif x < 0.40:
                t = Turn("How many bars are there?", str(len(bars)), "chart")
            elif x < 0.52:
                t = Turn(r.choice(("Which bar is the tallest?", "Which bar is the highest?", "Which is the largest?")), by[-1][0], "chart", (pic, by[-1][4]))
            elif x < 0.62:
                t = Turn(r.choice(("Which bar is the shortest?", "Which bar is the lowest?", "Which is the smallest?")), by[0][0], "chart", (pic, by[0][4]))
            elif x < 0.72:
                k = bars.index(by[-1])
                t = Turn("What colour is the tallest bar?", by[-1][1], "chart", (pic, 0), look={i: SHAPE_PLACE + k for i in range(len(by[-1][1]))})
            elif x < 0.80:
                k = bars.index(b)
                t = Turn("What colour is the bar %s?" % b[0], b[1], "chart", (pic, 0), look={i: SHAPE_PLACE + k for i in range(len(b[1]))})
            else:
                t = Turn(r.choice(("What is the value of %s?", "How high is %s?")) % b[0], str(b[2]), "chart", (pic, b[3]))
            if t.q not in [u.q for u in turns]:
                turns.append(t)
        return turns

    def scene_turns(self, shapes, count, where="", text=False):
        r = self.r
        colour = "What color" if r.random() < 0.35 else "What colour"
        turns = []
        if r.random() < 0.5:
            text_of = caption(shapes)
            turns.append(Turn(r.choice(ASK_SCENE), text_of, "scene", look=caption_looks(text_of, shapes)))
        if not text and not where and r.random() < 0.04:
            turns.append(Turn(r.choice(ASK_TEXT), NO_TEXT, "scene"))
        seen = set()
        for _ in range(count * 2):
            q, ans = shape_question(r, shapes, where, colour)
            if q not in seen and len(turns) < count:
                seen.add(q)
                turns.append(Turn(q, ans, "scene", look=answer_looks(q, ans, shapes)))
        r.shuffle(turns)
        return turns

    # ---- conversations ---------------------------------------------------
    def single(self, d, kind=None):
        """One picture of one tile -> (messages, pages). kind: ocr, receipt, chart, scene, scene with text."""
        r = self.r
        w = h = TILE
        if r.random() < 0.18:
            h = r.randint(96, 360)
            w = int(h * r.uniform(0.9, 1.14))
            if choose_grid(w, h) != (1, 1):
                w = h = TILE
        kind = kind or r.choices(("ocr", "scene", "receipt", "chart", "scene with text"),
                                 (0.58, 0.20, 0.09 * (d > 0.15), 0.10 * (d > 0.15), 0.03 * (d > 0.15)))[0]
        if kind == "ocr":
            page, lines = self.ocr_page(w, h, d)
            turns = self.read_turns(lines)
        elif kind == "receipt":
            page, lines, items = self.rd.receipt_page(w, h, r.randint(2, 4), h / TILE * r.uniform(15, 23))
            turns = self.receipt_turns(lines, items)
        elif kind == "chart":
            page, bars = self.rd.chart_page(w, h)
            turns = self.chart_turns(bars)
        elif kind == "scene with text":
            page, line = self.scene(w, h, d, range(6), True)
            turns = self.scene_turns(page.shapes, r.randint(1, 2), text=True) + [Turn(r.choice(ASK_TEXT), line, "line", (0, 0))]
            r.shuffle(turns)
        else:
            page, _ = self.scene(w, h, d)
            turns = self.scene_turns(page.shapes, r.randint(1, 3))
        return self.conversation([IMAGE], turns), [page]

    def grid_canvas(self, grids):
        """A canvas whose grid is one of `grids`; returns (w, h, px of a tile side in the canvas)."""
        r = self.r
        for _ in range(50):
            c, rows = r.choice(grids)
            px = r.choice((224, 224, 224, r.randint(110, 340)))
            w, h = int(c * px), int(rows * px)
            if px != 224:
                w, h = int(w * r.uniform(0.96, 1.04)), int(h * r.uniform(0.96, 1.04))
            if choose_grid(w, h) == (c, rows):
                return w, h, px
        return 448, 224, 224

    GRIDS = {3: [(2, 1), (1, 2)], 4: [(3, 1), (1, 3)], 5: [(2, 2), (2, 2), (4, 1), (1, 4)],
             7: [(5, 1), (3, 2), (3, 2), (2, 3), (6, 1), (1, 6)], 10: [(7, 1), (4, 2), (2, 4), (3, 3), (3, 3), (8, 1)],
             13: [(4, 3), (3, 4), (4, 3), (3, 4), (5, 2), (2, 5), (12, 1), (6, 2)]}

    def multi(self, slots, d, kind=None):
        """A picture of more than one tile, or two pictures, using at most `slots` tiles."""
        r = self.r
        if slots == 3 and kind is None and r.random() < 0.25:
            return self.two_images(d)
        w, h, px = self.grid_canvas(self.GRIDS[slots])
        kind = kind or r.choices(("ocr", "receipt", "chart", "scene"), (0.60, 0.14 * (w <= 2.5 * h), 0.12 * (h / 2 < w < 2.5 * h), 0.14))[0]
        if kind == "ocr":
            top = max(1, min(8, int(h / px * 2.7)))
            page, lines = self.ocr_page(w, h, max(d, 0.15), r.randint(1, 2 if d < 0.3 else top), px if r.random() < 0.65 else min(w, h))
            turns = self.read_turns(lines, task="multi")
        elif kind == "receipt":
            unit = px if r.random() < 0.5 else min(w, h)
            page, lines, items = self.rd.receipt_page(w, h, r.randint(2, 6), unit / TILE * r.uniform(15, 30))
            turns = self.receipt_turns(lines, items)
        elif kind == "chart":
            page, bars = self.rd.chart_page(w, h)
            turns = self.chart_turns(bars)
        else:
            page, _ = self.scene(w, h, d)
            turns = self.scene_turns(page.shapes, r.randint(2, 5))
        return self.conversation([IMAGE], turns), [page]

    def two_images(self, d):
        r = self.r
        pages, facts = [], []
        for _ in range(2):
            if r.random() < 0.5:
                page, lines = self.ocr_page(TILE, TILE, d, r.randint(1, 2))
                facts.append(("text", lines))
            else:
                page, _ = self.scene(TILE, TILE, d)
                facts.append(("shapes", page.shapes))
            pages.append(page)
        turns = []
        kinds = [f[0] for f in facts]
        if kinds[0] != kinds[1]:
            turns.append(("Which image shows text?", "Image-%d" % (kinds.index("text") + 1)))
            turns.append(("Which image shows shapes?", "Image-%d" % (kinds.index("shapes") + 1)))
        elif kinds[0] == "shapes" and len(facts[0][1]) != len(facts[1][1]):
            turns.append(("Which image shows more shapes?", "Image-%d" % (1 if len(facts[0][1]) > len(facts[1][1]) else 2)))
        elif kinds[0] == "text":
            turns.append(("Do both images show text?", "Yes"))
        r.shuffle(turns)
        turns = [Turn(q, ans, "scene") for q, ans in turns[:1]]
        for i in r.sample((0, 1), 2):
            if kinds[i] == "text":
                q = r.choice(("Read the text in Image-%d.", "What does the text in Image-%d say?")) % (i + 1)
                turns.append(Turn(q, "\n".join(facts[i][1]), "multi", (i, 0)))
            else:
                q = shape_question(r, facts[i][1], " in Image-%d" % (i + 1)) if r.random() < 0.6 else \
                    ("Describe Image-%d." % (i + 1), caption(facts[i][1]))
                turns.append(Turn(*q, "scene"))
        if r.random() < 0.4:
            r.shuffle(turns)
        head = ["Image-1: ", IMAGE, "\nImage-2: ", IMAGE] if r.random() < 0.85 else [IMAGE, "\n", IMAGE]
        return self.conversation(head, turns), pages

    def conversation(self, head, turns, system=0.12):
        """[(role, parts or Turn)]; the images stand before the first question."""
        msgs = []
        if self.r.random() < system:
            msgs.append(("system", [self.tg.system()]))
        for i, t in enumerate(turns):
            msgs.append(("user", (list(head) + ["\n" + t.q]) if i == 0 and head else [t.q]))
            msgs.append(("assistant", t))
        return msgs

    def text_chat(self):
        r = self.r
        turns = []
        for _ in range(r.choice((1, 1, 1, 1, 1, 2, 2, 3))):
            q, ans = self.tg.qa()
            if ans == NO_IMAGE and turns:
                continue
            turns.append(Turn(q, ans, "sum" if ans.isdigit() and any(c.isdigit() for c in q) and "letters" not in q else "chat"))
        return self.conversation([], turns, 0.2), []

    # ---- tokens ----------------------------------------------------------
    def encode(self, s):
        table = self.bytes
        return [table[b] for b in s.encode()]

    def tokens(self, msgs, tiles):
        """(ids, [(position of the first answer token, tokens, Turn)], positions of the images' tokens)."""
        start, end = self.ids["<|im_start|>"], self.ids["<|im_end|>"]
        ids, answers, images = [], [], []
        nl = self.encode("\n")
        for role, parts in msgs:
            ids.append(start)
            text = role + "\n"
            if role == "assistant":
                ids += self.encode(text)
                t = self.encode(parts.a) + [end]
                answers.append((len(ids), len(t), parts))
                ids += t
            else:
                for p in parts:
                    if p is IMAGE:
                        ids += self.encode(text)
                        ids.append(self.ids["<img>"])
                        images.append(len(ids))
                        ids += [self.ids["<IMG_CONTEXT>"]] * (TILE_TOKENS * tiles[len(images) - 1])
                        ids.append(self.ids["</img>"])
                        text = ""
                    else:
                        text += p
                ids += self.encode(text)
                ids.append(end)
            ids += nl
        return ids, answers, images

    def prompt_ids(self, msgs, tiles):
        """Token ids of messages without answers, ready for generation."""
        return self.tokens(msgs, tiles)[0] + [self.ids["<|im_start|>"]] + self.encode("assistant\n")

    def example(self, msgs, pages):
        e = Example()
        cut = [tiles_of(p.image) for p in pages]
        ids, answers, e.image_at = self.tokens(msgs, [len(t) for t, _ in cut])
        e.ids = np.array(ids, np.int32)
        e.tiles = [t for t, _ in cut]
        e.sigma = [p.sigma for p in pages]
        e.marks = [page_marks(p, g, self.rng) for p, (_, g) in zip(pages, cut)]
        tgt, weight, task, look = [], [], [], []
        cells = [None] * len(pages)
        for at, n, turn in answers:
            tgt += range(at, at + n)
            weight += [max(1.0, min(4.0, 16.0 / n))] * n
            task += [TASKS.index(turn.task)] * n
            if not turn.look:
                continue
            pic = turn.pic
            if cells[pic] is None:
                cells[pic] = char_cells(pages[pic], cut[pic][1])
            base = e.image_at[pic]
            for i, where in turn.look.items():
                c = cells[pic].get(where)
                if c is not None:
                    look.append((at + i - 1, base + c[0], base + c[1], pic))
        e.tgt, e.weight, e.task = np.array(tgt, np.int32), np.array(weight, np.float32), np.array(task, np.int32)
        e.look = np.array(look, np.int32).reshape(-1, 4)
        return e

    def ease(self, d):
        """Difficulty of one sample when the run is at d in [0, 1]: easy ones (a short line, large letters) never die out."""
        r = self.r
        return r.random() * d if r.random() < 0.6 - 0.35 * d else d
