"""Random text, chat tasks and small fact tables (no image code here).

Everything is drawn from `random.Random`, so a seed reproduces a sample.
"""
import os

HERE = os.path.dirname(os.path.abspath(__file__))

COMMON = """the be to of and in that have it for not on with he as you do at this but his by from they we say her she
or an will my one all would there their what so up out if about who get which go me when make can like time no just
him know take people into year your good some could them see other than then now look only come its over think also
back after use two how our work first well way even new want because any these give day most us red green blue yellow
open closed sale free hello world welcome exit enter stop start push pull news today price total cash card change
coffee tea milk bread butter cheese apple banana orange lemon sugar salt water juice soup rice pasta pizza cake pie
house home street road park river lake mountain city town country school office shop store market bank hotel station
train bus car bike plane ship boat map ticket gate platform north south east west left right top bottom front cat dog
bird fish horse cow sheep mouse lion tiger bear fox wolf tree flower grass leaf stone sand sun moon star sky rain snow
wind storm summer winter spring autumn morning evening night hour minute second week month please thank you sorry yes
table chair door window floor wall room kitchen garden book page paper pen letter word line number name date place
phone email address code key lock box bag cup plate knife fork spoon bottle glass hand head eye face foot arm heart
king queen prince doctor nurse teacher student driver baker farmer music song dance film game ball team player goal
big small long short high low fast slow hot cold old young happy sad dark light loud quiet clean dirty full empty
invoice receipt order item quantity amount tax discount subtotal balance due paid thanks visit again soon customer
service help desk info notice warning danger caution private public menu lunch dinner breakfast special offer""".split()

ITEMS = """coffee tea milk bread butter cheese apple banana orange lemon sugar salt water juice soup rice pasta pizza
cake pie eggs bagel muffin cookie salad burger fries steak fish chicken beans corn onion tomato potato carrot grapes
pears honey jam soap towel candle pen book lamp socks hat scarf gloves""".split()

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Hungary": "Budapest",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "Indonesia": "Jakarta", "Australia": "Canberra", "Canada": "Ottawa", "Mexico": "Mexico City",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Brazil": "Brasilia", "Argentina": "Buenos Aires",
    "Belgium": "Brussels", "Romania": "Bucharest", "Bulgaria": "Sofia", "Iceland": "Reykjavik", "Iran": "Tehran",
    "Iraq": "Baghdad", "Morocco": "Rabat", "South Korea": "Seoul", "Nepal": "Kathmandu", "Switzerland": "Bern",
}
OPPOSITES = {"hot": "cold", "big": "small", "up": "down", "left": "right", "fast": "slow", "open": "closed",
             "happy": "sad", "light": "dark", "old": "new", "high": "low", "long": "short", "full": "empty",
             "day": "night", "early": "late", "loud": "quiet", "wet": "dry", "hard": "soft", "rich": "poor",
             "strong": "weak", "north": "south", "east": "west", "first": "last", "clean": "dirty", "true": "false"}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]
SYSTEM = ["You are a helpful assistant.", "You are a concise assistant.", "Answer briefly.",
          "You are a careful assistant that reads images.", "You answer questions about images and text.",
          "You are InternVL, a helpful vision-language assistant."]
WHO = "I am a tiny vision-language model. I can read text in images, describe shapes and simple charts and do small sums."
CANNOT = "I cannot answer that. I read text in images, describe shapes and simple charts, and do small sums."
NO_IMAGE = "I cannot see an image. Please attach one."
TOO_LARGE = "I cannot do sums that large."

# Questions that a model of this size has no answer to; {w} is any word, {n} a number.
BEYOND = """Tell me a story.|Tell me a long story about the {w}.|Tell me a story about a {w}, please.|Write a poem about {w}.
Write a short poem.|Tell me a joke.|Tell me about {w}.|What do you think about {w}?|Explain {w} to me.|What is {w}?|What is a {w}?
What does {w} mean?|Who invented the {w}?|Who is {w}?|Who was the first {w}?|Why is the sky blue?|Why is {w} so {w}?|When was {w} born?
Where is {w}?|Where can I buy a {w}?|How do I make {w}?|How do you cook {w}?|How does a {w} work?|How far is it to {w}?|How old is {w}?
What is the weather today?|Will it rain tomorrow?|What time is it?|What is today's date?|What day is it today?|What year is it?
Write a program that sorts a list.|Write a function in Python.|Fix this code: {w}({n})|Translate {w} into French.|Translate this: {w} {w}
Say {w} in Spanish.|Summarise the book {w}.|Recommend a film.|Recommend a {w}.|Who won the {w} cup?|Who will win the election?
Give me advice about {w}.|How do I get rich?|What is the meaning of life?|Is there life on Mars?|Do you love me?|Are you happy?
Do you dream?|What is the population of {w}?|How many people live in {w}?|What is the price of a {w}?|Book a table for {n}.
Order a {w} for me.|Call my {w}.|Set an alarm for {n}.|Play some music.|Sing a song.|Draw a {w}.|Make a picture of a {w}.
What is the square root of {n}?|Solve the equation x + {n} = {w}.|Prove that {w} is {w}.|List {n} kinds of {w}.|Name three {w}s.
Can you help me with {w}?|I need a {w}.|I feel {w} today.|Let us talk about {w}.|Continue: {w} {w} {w}|Compare {w} and {w}.
Plan a trip to {w}.|Write an email to my {w}.|Write an essay about {w}.|What is the best {w}?|Describe a {w}.|What rhymes with {w}?"""
BEYOND = [q for line in BEYOND.split("\n") for q in line.split("|")]
ABOUT_IMAGE = ["Read the text in the image.", "Describe the image.", "What is in the image?", "What does the text say?",
               "How many shapes are there?", "What colour is the largest shape?", "What is the total?", "Describe this picture.",
               "What do you see?", "What do you see in the image?", "How many bars are there?", "Can you read this image?"]

ONSETS = "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr sh sl sn sp st th tr tw qu x y".split()
VOWELS = "a e i o u a e i o ai ea ee oo ou ie".split()
CODAS = ["", "", "", "n", "r", "t", "s", "l", "m", "d", "p", "k", "ng", "st", "nd", "ck", "x", "ll"]


LETTERS = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567890123456789"


def load_words(path=None):
    """(training words, held-out words): a fixed tenth of the list is never used in training."""
    with open(path or os.path.join(HERE, "words.txt")) as f:
        words = [w.strip() for w in f if w.strip()]
    common = set(COMMON)
    train, held = [], []
    for i, w in enumerate(words):
        (held if i % 10 == 7 and w not in common else train).append(w)
    return train, held


class TextGen:
    def __init__(self, rng, words=None, held_only=False):
        self.r = rng
        train, held = load_words() if words is None else words
        self.words = held if held_only else train
        self.held_only = held_only
        self.short = 0
        self.random_share = 0.3               # share of words without any language in them: only looking helps there

    # ---- words and lines -------------------------------------------------
    def word(self):
        r = self.r
        x = r.random()
        if self.held_only:
            return r.choice(self.words)
        if x < self.random_share:
            return "".join(r.choice(LETTERS) for _ in range(r.choice((1, 2, 2, 3, 3, 4, 5, 6))))
        x = r.random()
        if x < 0.30:
            return r.choice(COMMON)
        if x < 0.80:
            return r.choice(self.words)
        return self.pseudo()

    def pseudo(self):
        r = self.r
        return "".join(r.choice(ONSETS) + r.choice(VOWELS) + r.choice(CODAS) for _ in range(r.choice((1, 1, 2, 2, 3))))

    def cased(self, words):
        x = self.r.random()
        if x < 0.45:
            return words
        if x < 0.60:
            return [words[0].capitalize()] + words[1:]
        if x < 0.80:
            return [w.capitalize() for w in words]
        return [w.upper() for w in words]

    def number(self):
        r = self.r
        x = r.random()
        if x < 0.25:
            return str(r.randrange(10 ** r.randint(1, 6)))
        if x < 0.40:
            return "%.2f" % (r.randrange(1, 100000) / 100)
        if x < 0.50:
            return "$%.2f" % (r.randrange(1, 50000) / 100)
        if x < 0.60:
            return "%04d-%02d-%02d" % (r.randint(1950, 2039), r.randint(1, 12), r.randint(1, 28))
        if x < 0.68:
            return "%02d:%02d" % (r.randrange(24), r.randrange(60))
        if x < 0.74:
            return "%d%%" % r.randrange(101)
        if x < 0.82:
            return "%03d-%04d" % (r.randrange(1000), r.randrange(10000))
        if x < 0.88:
            return "{:,}".format(r.randrange(1000, 10 ** 7))
        if x < 0.94:
            return "%d/%d/%d" % (r.randint(1, 12), r.randint(1, 28), r.randint(1990, 2030))
        return "+%d %03d %04d" % (r.randint(1, 99), r.randrange(1000), r.randrange(10000))

    def code(self):
        r = self.r
        al = "ABCDEFGHJKLMNPQRSTUVWXYZ"
        x = r.random()
        if x < 0.4:
            return "".join(r.choice(al) for _ in range(r.randint(1, 3))) + "-" + str(r.randrange(10, 10000))
        if x < 0.7:
            return "".join(r.choice(al + "0123456789") for _ in range(r.randint(4, 8)))
        if x < 0.85:
            return "#" + str(r.randrange(1, 100000))
        return "%s@%s.%s" % (r.choice(COMMON), r.choice(COMMON), r.choice(("com", "org", "net")))

    def words_line(self, n):
        return " ".join(self.cased([self.word() for _ in range(n)]))

    def sentence(self, n):
        r = self.r
        w = [self.word() for _ in range(n)]
        w[0] = w[0].capitalize()
        if n > 3 and r.random() < 0.3:
            w[r.randrange(1, n - 1)] += ","
        return " ".join(w) + r.choice((".", ".", ".", "!", "?"))

    def line(self, nwords):
        """One line of text of about `nwords` words; while `short` is set, that many random letters at most."""
        r = self.r
        if self.short:
            return "".join(r.choice(LETTERS) for _ in range(r.randint(1, self.short)))
        x = r.random()
        if x < 0.50:
            return self.words_line(nwords)
        if x < 0.64:
            return self.sentence(max(2, nwords))
        if x < 0.78:
            return " ".join(self.number() for _ in range(max(1, min(3, nwords - r.randrange(2)))))
        if x < 0.86:
            return self.code()
        if x < 0.92:
            return self.words_line(max(1, nwords - 1)) + r.choice((": ", " ", " - ", " = ")) + self.number()
        if x < 0.97:
            a, b = r.choice((("(", ")"), ('"', '"'), ("[", "]"), ("*", "*"), ("'", "'")))
            return a + self.words_line(max(1, nwords - 1)) + b
        return "".join(r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?&@#$%+-=:;/.,()")
                       for _ in range(r.randint(2, 8)))

    def receipt(self, rows):
        r = self.r
        names = r.sample(ITEMS, rows)
        prices = [r.randrange(25, 2500) for _ in names]
        return names, prices

    def bar_names(self, n):
        """Names for the bars of a chart."""
        r = self.r
        x = r.random()
        if x < 0.3:
            i = r.randrange(27 - n)
            return list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i:i + n])
        if x < 0.5:
            seq = [m[:3] for m in (MONTHS if r.random() < 0.5 else DAYS)]
            i = r.randrange(len(seq) - n + 1)
            return seq[i:i + n]
        if x < 0.6:
            i = r.randint(1995, 2040 - n)
            return [str(i + k) for k in range(n)]
        pool = ITEMS if x < 0.85 else [w for w in COMMON if len(w) < 6]
        return [w.capitalize() for w in r.sample([w for w in pool if len(w) < 7], n)]

    # ---- text-only chat --------------------------------------------------
    def beyond(self):
        """(question, refusal) about something this model cannot know, see or do."""
        r = self.r
        x = r.random()
        if x < 0.2:
            return r.choice(ABOUT_IMAGE), NO_IMAGE
        if x < 0.35:
            a, b = r.randrange(200, 10 ** r.randint(3, 6)), r.randrange(200, 10 ** r.randint(3, 6))
            return r.choice(("What is %d + %d?", "What is %d plus %d?", "%d + %d = ?", "What is %d - %d?", "What is %d minus %d?",
                             "What is %d times %d?", "%d * %d = ?", "Add %d and %d.")) % (a, b), TOO_LARGE
        q = r.choice(BEYOND)
        while "{w}" in q:
            q = q.replace("{w}", r.choice(self.words) if r.random() < 0.6 else self.pseudo(), 1)
        while "{n}" in q:
            q = q.replace("{n}", str(r.randrange(2, 3000)), 1)
        y = r.random()
        if y < 0.15:
            q = q.lower()
        elif y < 0.3:
            q = q.rstrip(".?") + r.choice((", please.", " please", "!", " Thanks.", "..."))
        elif y < 0.4:
            q = r.choice(("Please: ", "Hey, ", "Can you help? ", "Question: ")) + q
        elif y < 0.45:
            q = q.rstrip(".?") + ", " + self.words_line(r.randint(2, 6)) + "."
        return q, CANNOT

    def qa(self):
        """One (question, answer) pair without an image."""
        r = self.r
        x = r.random()
        if x < 0.40:
            return self.arith()
        if x < 0.52:
            return self.beyond()
        x = 0.36 + 0.64 * (x - 0.52) / 0.48
        if x < 0.44:
            w = self.short_word(3, 7)
            return r.choice(("Spell the word %s.", "Spell %s.", "How do you spell %s?", 'Spell "%s".')) % w, "-".join(w)
        if x < 0.54:
            w = self.short_word(2, 6)
            return r.choice(("Reverse the word %s.", "Write %s backwards.", "Reverse %s.")) % w, w[::-1]
        if x < 0.62:
            a, b = r.sample(range(1000 if r.random() < 0.3 else 100), 2)
            if r.random() < 0.5:
                return r.choice(("Which is larger, %d or %d?", "Which number is bigger, %d or %d?")) % (a, b), str(max(a, b))
            return r.choice(("Which is smaller, %d or %d?", "Which number is less, %d or %d?")) % (a, b), str(min(a, b))
        if x < 0.74:
            c = r.choice(sorted(CAPITALS))
            return r.choice(("What is the capital of %s?", "Capital of %s?", "Name the capital of %s.")) % c, \
                CAPITALS[c]
        if x < 0.79:
            w = r.choice(sorted(OPPOSITES))
            return r.choice(("What is the opposite of %s?", "Give the opposite of %s.")) % w, OPPOSITES[w]
        if x < 0.84:
            seq = DAYS if r.random() < 0.5 else MONTHS
            i = r.randrange(len(seq))
            kind = "day" if seq is DAYS else "month"
            if r.random() < 0.6:
                return "What %s comes after %s?" % (kind, seq[i]), seq[(i + 1) % len(seq)]
            return "What %s comes before %s?" % (kind, seq[i]), seq[(i - 1) % len(seq)]
        if x < 0.88:
            w = self.short_word(2, 9)
            return "How many letters are in the word %s?" % w, str(len(w))
        if x < 0.92:
            t = self.words_line(r.randint(1, 4))
            return r.choice(("Repeat: %s", "Repeat after me: %s", "Say: %s")) % t, t
        if x < 0.95:
            ns = r.sample(range(100), r.randint(2, 4))
            return "Sort these numbers: %s" % ", ".join(map(str, ns)), ", ".join(map(str, sorted(ns)))
        return r.choice((("Hello!", "Hello! How can I help you?"), ("Hi", "Hello! How can I help you?"), ("Hi!", "Hello! How can I help you?"),
                         ("Hello", "Hello! How can I help you?"), ("Hi there!", "Hello! How can I help you?"),
                         ("hello", "Hello! How can I help you?"), ("hi", "Hello! How can I help you?"),
                         ("Hey", "Hello! How can I help you?"),
                         ("Who are you?", WHO), ("What are you?", WHO), ("What can you do?", WHO), ("Help", WHO), ("Help me.", WHO),
                         ("What is your name?", WHO), ("Introduce yourself.", WHO),
                         ("Thank you.", "You are welcome."), ("Thanks!", "You are welcome."), ("Thank you!", "You are welcome."),
                         ("Good morning.", "Good morning! How can I help you?"), ("Good morning!", "Good morning! How can I help you?"),
                         ("How are you?", "I am fine, thank you."), ("Bye", "Goodbye!"), ("Goodbye", "Goodbye!"), ("Goodbye!", "Goodbye!")))

    def arith(self):
        r = self.r
        a, b = r.randrange(100), r.randrange(100)
        if r.random() < 0.10:
            a, b = r.randrange(13), r.randrange(13)
            return r.choice(("What is %d times %d?", "%d * %d = ?", "What is %d x %d?")) % (a, b), str(a * b)
        if r.random() < 0.55:
            return r.choice(("What is %d + %d?", "What is %d + %d?", "What is %d plus %d?", "%d + %d = ?", "Add %d and %d.",
                             "Calculate %d + %d.")) % (a, b), str(a + b)
        a, b = max(a, b), min(a, b)
        return r.choice(("What is %d - %d?", "What is %d - %d?", "What is %d minus %d?", "%d - %d = ?",
                         "Calculate %d - %d.")) % (a, b), str(a - b)

    def short_word(self, lo, hi):
        for _ in range(20):
            w = self.word()
            if lo <= len(w) <= hi:
                return w
        return "cat"

    def system(self):
        return self.r.choice(SYSTEM)
