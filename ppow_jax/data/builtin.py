"""Original, procedurally generated user prompts: grade-school maths, small code tasks, chat.

Every word table below (names, items, topics, whole programming tasks ...) is cut once, by position:
each fifth entry is for "eval" only and the others are for "train" only. Every template has a slot
filled from such a table, so no eval prompt is a train prompt with other numbers or phrasing.

The templates use a small notation: `{a|b}` picks one alternative, `{slot}` is a word from the table
`slot` (or a number, or a piece of template in `_MACROS`), `{slot2}` a different word from it, and
`{slot+mod}` the word changed as in `_MODIFIERS`. A slot keeps its value for the whole prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice

from ppow_jax.data.prompt import Prompt

KINDS = ("maths", "code", "chat")
SPLITS = ("train", "eval")
_TRAIN_COUNTS = {"maths": 2400, "code": 1600, "chat": 1600}
_EVAL_COUNT = 200  # of each kind
_HOLD_OUT_EVERY = 5
_TRIES = 20  # attempts at a first turn not seen before, until its template sits out a round


@dataclass(frozen=True)
class _Template:
    """A question, its possible follow-ups and, for maths, its numbers and how to solve it."""

    text: str
    follow_ups: tuple[str, ...] = ()
    numbers: str = ""
    steps: Callable[..., tuple[float, ...]] = lambda: ()


def generate(kind: str, split: str) -> list[Prompt]:
    """All prompts of one kind and split, always the same, in an order whose prefixes are mixed."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    drafts = islice(_drafts(kind, split), _TRAIN_COUNTS[kind] if split == "train" else _EVAL_COUNT)
    return [Prompt(f"{kind}-{split}-{i:05d}", kind, turns) for i, (turns, _) in enumerate(drafts)]


def _drafts(kind: str, split: str) -> Iterator[tuple[tuple[str, ...], int | None]]:
    """Endless distinct (turns, answer) pairs; only maths has answers.

    Each round uses every template once, in a new order: that is what makes prefixes representative.
    """
    rng = random.Random(f"ppow_jax builtin prompts, {kind}, {split}")
    writer = _Writer(rng, split)
    seen: set[str] = set()
    while True:
        for template in rng.sample(_TEMPLATES[kind], len(_TEMPLATES[kind])):
            for _ in range(_TRIES):
                turns, answer = writer.write(template)
                if turns[0] not in seen:
                    seen.add(turns[0])
                    yield turns, answer
                    break


class _Writer:
    """Fills templates with the words of one split."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self._rng = rng
        self._split = split
        self._decks: dict[str, list[str]] = {}

    def write(self, template: _Template) -> tuple[tuple[str, ...], int | None]:
        """The turns of a prompt and the answer to its question, if that is known."""
        numbers, answer = _draw_numbers(self._rng, template)
        values = {name: str(number) for name, number in numbers.items()}
        turns = [self._fill(template.text, values)]
        if template.follow_ups and self._rng.random() < 0.5:
            turns.append(self._fill(self._rng.choice(template.follow_ups), values))
        return tuple(turns), answer

    def _fill(self, text: str, values: dict[str, str]) -> str:
        """`text` with its innermost braces resolved until none is left; adds to `values`."""
        while found := re.search(r"\{([^{}]*)\}", text):
            text = text[: found.start()] + self._resolve(found[1], values) + text[found.end() :]
        return " ".join(text.split())

    def _resolve(self, body: str, values: dict[str, str]) -> str:
        if "|" in body:
            return self._rng.choice(body.split("|"))
        if body in _MACROS:
            return _MACROS[body]
        slot, _, modifier = body.partition("+")
        if slot not in values:
            table = _TABLE_OF_FIELD.get(slot.rstrip("23"), slot.rstrip("23"))
            word = self._deal(table, taken=values.values())
            values |= _fields(table, word, suffix=slot[len(slot.rstrip("23")) :])
        return _MODIFIERS[modifier](values[slot])

    def _deal(self, table: str, taken: Collection[str]) -> str:
        """The next word of a table, from a shuffled deck so that all words are used alike."""
        while True:
            if not self._decks.get(table):
                words = held_words(table, self._split)
                self._decks[table] = self._rng.sample(words, len(words))
            if (word := self._decks[table].pop()) not in taken:
                return word


def held_words(table: str, split: str) -> list[str]:
    """The words of a table that belong to a split."""
    held_out = _WORDS[table][_HOLD_OUT_EVERY - 1 :: _HOLD_OUT_EVERY]
    return held_out if split == "eval" else [w for w in _WORDS[table] if w not in held_out]


def _fields(table: str, word: str, suffix: str) -> dict[str, str]:
    """The slots that a drawn word fills: most often one, several for a record."""
    if table == "name":
        forms = ("she", "her", "her") if word in _WORDS["she"] else ("he", "his", "him")
        parts = [word, forms[0].title(), *forms]
    else:  # tables are comma-separated, so a comma within a word is written as a semicolon
        parts = re.split(r" ?\| ?", word.replace(";", ","))
    filled = dict(zip(_RECORDS.get(table, (table,)), parts, strict=True))
    return {slot + suffix: value for slot, value in filled.items()}


def _draw_numbers(rng: random.Random, template: _Template) -> tuple[dict[str, int], int | None]:
    """Numbers for which all steps of the solution are positive integers, and the last step."""
    ranges = {}
    for spec in template.numbers.split():  # such as a=3-9 or, in steps of 5, a=10-90/5
        name, low, high, step = re.split("[=/-]", spec if "/" in spec else spec + "/1")
        ranges[name] = range(int(low), int(high) + 1, int(step))
    while True:
        numbers = {name: rng.choice(values) for name, values in ranges.items()}
        steps = template.steps(**numbers)
        if all(step > 0 and step == int(step) for step in steps):
            return numbers, int(steps[-1]) if steps else None


def _with_article(word: str) -> str:
    """`word` after "a" or "an", by its sound (an 8, an 11, a uniform)."""
    vowel = re.match(r"[aeio]|u(?!ni|ku)|8|1[18]$|hour|honest", word.lower())
    return f"{'an' if vowel else 'a'} {word}"


def _plural(word: str) -> str:
    """The plural of a regular noun."""
    if re.search(r"([sx]|ch|sh|[tg]o)$", word):
        return word + "es"
    return re.sub(r"(?<=[^aeiou])y$", "ie", word) + "s"


_MODIFIERS: dict[str, Callable[[str], str]] = {
    "": str,
    "s": _plural,
    "a": _with_article,
    "A": lambda word: _with_article(word).capitalize(),
    "js": lambda name: re.sub(r"_(.)", lambda found: found[1].upper(), name),
}


def _parse_words(block: str) -> dict[str, list[str]]:
    """Tables from entries `table: word, word, ...`, each on one or more lines and with a dot."""
    rows = (" ".join(row.split()).split(": ") for row in block.split(".\n")[:-1])
    return {table: words.split(", ") for table, words in rows}


def _parse_templates(block: str) -> list[_Template]:
    """Templates from entries `- question`, each with any number of `> follow-up` behind it."""
    entries = (" ".join(entry.split()) for entry in re.split(r"^- ", block, flags=re.M)[1:])
    return [_Template(text, tuple(rest)) for text, *rest in (e.split(" > ") for e in entries)]


_WORDS = _parse_words("""
she: Aisha, Bella, Chloe, Daria, Elena, Fatima, Grace, Hana, Ines, Julia, Keiko, Leila, Maya, Rosa,
  Yara.
he: Ahmed, Ben, Carlos, David, Ethan, Felix, Hugo, Ivan, Kofi, Jack, Liam, Marco, Pedro, Ravi, Omar.
item: notebook, mug, ruler, candle, key ring, poster, tea towel, puzzle, sketchbook, fridge magnet,
  comic, lunch box, gift bag, brush, umbrella, plant pot, paintbrush, torch, bowl, yo-yo.
wish: bicycle, guitar, skateboard, telescope, drone, tablet, camera, tent, keyboard, violin, kayak,
  sewing machine, surfboard, game console, printer, desk, armchair, coat, bookcase, microscope.
token: sticker, marble, stamp, coin, postcard, trading card, button, badge, toy soldier, bead.
elder: grandmother, grandfather, teacher, neighbour, godmother, doctor, coach, uncle, aunt, nanny.
town: Oakdale, Milton, Ashford, Eastport, Northfield, Fairview, Lakewood, Redhill, Kingsley,
  Westbury.
bake: muffin, pancake, scone, cookie, waffle, bread roll, cupcake, brownie, pretzel, bagel.
subject: history, geography, biology, chemistry, physics, French, economics, music, art, Latin.
fruit: apple, orange, pear, lemon, plum, peach, mango, apricot, lime, melon.
pet: cat, dog, rabbit, hamster, parrot, guinea pig, tortoise, canary, gerbil, ferret.
flower: sunflower, tulip, rose bush, dahlia, hollyhock, lily, bamboo, fern, orchid, foxglove.
task: is_palindrome | text | checks whether a text reads the same backwards | 'level' | True,
  count_vowels | text | counts the vowels in a string | 'banana' | 3,
  fizz_buzz | n | returns the FizzBuzz words for 1 to n as a list | 3 | [1; 2; 'Fizz'],
  is_prime | n | tells whether a whole number is prime | 97 | True,
  roman_to_int | numeral | converts a Roman numeral to a whole number | 'XIV' | 14,
  merge_sorted | left; right | merges two sorted lists into one | [1; 4]; [2] | [1; 2; 4],
  second_largest | numbers | finds the second-largest distinct number of a list | [4; 9; 9; 7] | 7,
  longest_word | text | returns the longest word of a sentence | 'a quiet morning' | 'morning',
  unique | items | removes repeated items but keeps the order of the rest | [3; 1; 3] | [3; 1],
  caesar | text; k | shifts every letter k places along the alphabet | 'abc'; 2 | 'cde',
  flatten | nested | flattens a list of lists of any depth | [1; [2; [3]]] | [1; 2; 3],
  digit_sum | n | adds up the decimal digits of a non-negative integer | 5032 | 10,
  are_anagrams | a; b | decides whether two words are anagrams | 'listen'; 'silent' | True,
  search | numbers; x | does a binary search and returns the index of x or -1 | [2; 5; 8]; 8 | 2,
  transpose | matrix | swaps the rows and columns of a matrix | [[1; 2]; [3; 4]] | [[1; 3]; [2; 4]],
  gcd | a; b | computes the greatest common divisor of two positive integers | 36; 60 | 12,
  fibonacci | n | returns the first n Fibonacci numbers from 0 | 5 | [0; 1; 1; 2; 3],
  is_balanced | text | checks whether round and square brackets are balanced | '([)]' | False,
  run_length | text | replaces each run of a letter by the letter and its count | 'aaab' | 'a3b1',
  rotate | items; k | moves the first k items of a list to its end | [1; 2; 3]; 1 | [2; 3; 1],
  chunk | items; size | cuts a list into pieces of a given size | [1; 2; 3]; 2 | [[1; 2]; [3]],
  common_prefix | words | finds the longest prefix that all words share | ['flow'; 'flat'] | 'fl',
  missing | numbers | finds the only number from 0 to n that a list lacks | [3; 0; 1] | 2,
  title_case | text | capitalises the first letter of every word | 'an old cat' | 'An Old Cat',
  is_leap_year | year | applies the leap-year rule of the Gregorian calendar | 1900 | False,
  two_sum | numbers; x | finds the indices of two numbers with the sum x | [2; 7; 11]; 9 | [0; 1],
  max_run_sum | numbers | finds the largest sum of a contiguous part of a list | [-2; 3; 4; -1] | 7,
  to_binary | n | writes a non-negative integer in binary digits | 10 | '1010',
  running_total | numbers | returns the running totals of a list | [1; 2; 3] | [1; 3; 6],
  mask | number | hides all but the last four digits of a card number | '12345678' | '****5678'.
schema: orders|customer|amount, bookings|guest|price, rides|driver|fare, donations|donor|euros,
  repairs|mechanic|cost, races|runner|points, visits|patient|fee, payments|tenant|rent,
  matches|player|score, auctions|seller|bid.
ext: csv, log, txt, json, xml, html, md, py, sql, yaml, css, ini, tex, js, toml.
folder: reports, exports, downloads, logs, invoices, drafts, projects, scans, backups, receipts.
topic: photosynthesis, inflation, black holes, vaccines, plate tectonics, compound interest,
  blockchain, gravity, machine learning, the water cycle, magnetism, encryption, antibiotics, solar
  eclipses, radio waves.
pair: a crocodile and an alligator, jam and marmalade, weather and climate, a moth and a butterfly,
  a virus and a bacterium, butter and margarine, a comet and a meteor, debit and credit, speed and
  acceleration, a monarchy and a republic.
scene: a rainy Sunday, an empty theatre, the first day of spring, a forgotten garden, a night train,
  the last ferry home, an old clock, a village market, a snowstorm, the smell of fresh bread, an
  attic full of boxes, a lost mitten, the sound of the sea, a busy kitchen, a stubborn goat.
mail: my landlord about a broken heater, my boss to ask for a day off, a client to explain a delay,
  my neighbours about a party, a shop to return a kettle, my team to move a meeting, a friend to
  cancel dinner, a teacher about a sick child, a colleague to say thank you, an airline about lost
  luggage.
trouble: cannot fall asleep, put off my homework, get nervous before exams, never save any money,
  forget people's names, work too much, feel lonely, eat too many sweets, am always late, find it
  hard to say no.
howto: get coffee stains out of a shirt, repot a cactus, boil an egg, unclog a sink, patch a flat
  tyre, sharpen a knife, write a first CV, make compost, train a puppy, fold a fitted sheet.
idea: names for a bakery, indoor games for children, cheap presents, weekend outings, ways to use
  less plastic, quick dinners, healthy habits, podcast topics, party themes, slogans for a gym.
role: a museum guide, a medieval knight, a friendly pirate, a hotel receptionist, a Roman senator, a
  science teacher, a travel agent, a film critic, a personal trainer, a beekeeper.
city: Lisbon, Kyoto, Prague, Vancouver, Naples, Edinburgh, Istanbul, Hanoi, Athens, Montreal.
food: rice, eggs, spinach, mushrooms, chickpeas, potatoes, tomatoes, tofu, pasta, lentils.
skill: the ukulele, Spanish, first aid, sewing, sign language, Korean, sailing, chess, poker,
  meditation.
book: Hamlet, Moby-Dick, Frankenstein, Macbeth, Dracula, Othello, Jane Eyre, Emma, Ulysses, Don
  Quixote.
event: bake sale, staff meeting, school trip, open day, charity run, yoga class, film night, picnic,
  fair, raffle.
person: Marie Curie, Leonardo da Vinci, Cleopatra, Ada Lovelace, Nelson Mandela, Isaac Newton, Rosa
  Parks, Charles Darwin, Joan of Arc, Alan Turing.
habit: working from home, keeping chickens, a four-day week, school uniforms, living abroad, eating
  less meat, owning a car, reading in bed, daily naps, self-checkout tills.
why: is the sky blue, do cats purr, does bread rise, does ice float, do onions make us cry, is the
  sea salty, do we dream, do leaves change colour, do birds migrate, does popcorn pop.
idiom: break the ice, spill the beans, a piece of cake, bite the bullet, on thin ice, once in a blue
  moon, the last straw, hit the nail on the head, pull strings, under the weather.
""")
_WORDS["name"] = _WORDS["she"] + _WORDS["he"]
_RECORDS = {
    "name": ("name", "He", "he", "his", "him"),
    "task": ("fn", "args", "does", "given", "result"),
    "schema": ("rows", "who", "measure"),
}
_TABLE_OF_FIELD = {field: table for table, fields in _RECORDS.items() for field in fields}
_MACROS = {
    "n": "{3|5|7|10}",
    "def": "`{fn}({args})`",
    "example": "For example, `{fn}({given})` should return `{result}`.",
    "more": "{|{example}|{example} {limit}|{limit}}",
    "limit": "{Use type hints.|Add a docstring.|Do not import anything.|Explain the running time."
    "|Raise a ValueError for invalid input.|Keep it under 15 lines.}",
    "tone": "{|Keep it short.|Be specific.|Use plain words.|Answer in one paragraph.}",
    "sql": "{I|We} have a table `{rows}` with the columns `id`, `{who}`, `{measure}` and `date`. "
    "{Write|Show me|I need} an SQL query that",
    "bash": "{Write|Please write|Show me} a bash {script|command} that",
    "files": "the .{ext} files in the folder `{folder}`",
}

# fmt: off
_MATHS = [_Template(text, (), numbers, steps) for text, numbers, steps in (
    ("{name} buys {a} {item+s} at ${b} each and {c} {item2+s} at ${d} each. {He} pays with ${e}. "
     "{How much change does {he} get?|How many dollars does {he} get back?}",
     "a=3-9 b=2-6 c=2-8 d=3-9 e=50-100/50", lambda a, b, c, d, e: (e - a * b - c * d,)),
    ("{wish+A} costs ${a}. In a sale the price drops by {b}%, and {name} has a coupon for another "
     "${c} off the sale price. How much does {he} pay?",
     "a=80-400/20 b=10-40/5 c=5-30/5", lambda a, b, c: (a * (100 - b) / 100 - c,)),
    ("{name} is saving for {wish+a} that costs ${a}. {He} has ${b} and earns ${c} a week "
     "by {tutoring|babysitting}, ${d} of which {he} spends. How many weeks must {he} save?",
     "a=120-400/20 b=20-80/10 c=20-40/5 d=5-15/5", lambda a, b, c, d: (c - d, (a - b) / (c - d))),
    ("{name} has {a} {token+s} and buys {b} packs of {c} {token+s}. {He} keeps {d} and shares the "
     "rest equally among {e} friends. How many {token+s} does each friend get?",
     "a=10-60 b=2-6 c=5-12 d=5-30 e=3-8", lambda a, b, c, d, e: (a - d, (a + b * c - d) / e)),
    ("{name} gives 1/{b} of {his} {a} {token+s} to {name2} and then 1/{c} of the remaining ones to "
     "{his} {elder}. How many {token+s} {does {name} have left|are left}?",
     "a=24-120/4 b=2-6 c=2-5", lambda a, b, c: (a / b, (a - a / b) / c, (a - a / b) * (1 - 1 / c))),
    ("{name} is {a} years older than {name2}. In {b} years, their ages will add up to {c}. "
     "How old is {name2} {now|today}?",
     "a=2-12 b=2-10 c=40-90", lambda a, b, c: ((c - a - 2 * b) / 2,)),
    ("{name} is {a} years old, and {his} {elder} is {b} times as old. How old will the {elder} be "
     "when {name} {turns {c}|is {c} years old}?",
     "a=10-13 b=4-6 c=15-30", lambda a, b, c: (a * b + c - a,)),
    ("A {car|bus|van} from {town} to {town2} travels at {a} km/h for {b} hours and then at "
     "{c} km/h for the last {d} hours. {How long is the route in km?|How many km are covered?}",
     "a=70-110/5 b=2-5 c=40-65/5 d=2-4", lambda a, b, c, d: (a * b + c * d,)),
    ("{town} and {town2} are {a} km apart. A {bus|van} leaves each of them at 8:00, and they "
     "head for each other at {b} km/h and {c} km/h. After how many hours do they meet?",
     "a=180-900/30 b=40-90/5 c=45-95/5", lambda a, b, c: (a / (b + c) - 1, a / (b + c))),
    ("The perimeter of a rectangular {field|lawn|park} in {town} is {a} m, and it is {b} m "
     "longer than wide. What is its area in square metres?",
     "a=60-240/4 b=4-20", lambda a, b: ((a - 2 * b) / 4 - b / 2, (a - 2 * b) * (a + 2 * b) / 16)),
    ("A recipe for {a} {bake+s} calls for {b} grams of flour. {name} wants to make {d} {bake+s} "
     "and has {e} grams of flour. How many more grams does {he} need?",
     "a=4-12/2 b=120-360/20 d=14-60/2 e=50-200/10", lambda a, b, d, e: (b * d / a - e,)),
    ("{name} gets home at 15:{a}. {He} spends {b} minutes on {subject} homework, {c} minutes on "
     "{subject2} and {d} minutes on chores. How many minutes are left until dinner at 18:30?",
     "a=10-50/5 b=20-50/5 c=15-45/5 d=10-30/5", lambda a, b, c, d: (210 - a - b - c - d,)),
    ("{name} mixes {a} litres of a drink with {b}% {fruit} juice and {c} litres of one with {d}%. "
     "What percentage of the mixture is {fruit} juice?",
     "a=2-8 b=10-40/5 c=2-8 d=50-90/5", lambda a, b, c, d: ((a * b + c * d) / (a + c),)),
    ("{name} scored {a}, {b} and {c} points in three {subject} tests. What must {he} score in the "
     "fourth for an average of {d} points{|, if 100 is the maximum}?",
     "a=65-80 b=65-80 c=65-80 d=69-76", lambda a, b, c, d: (4 * d - a - b - c,)),
    ("A shelter in {town} has {c} animals: {pet+s} and {pet2+s} in the ratio {a} to {b}. After {d} "
     "of the {pet+s} find a home, how many {pet+s} are left?",
     "a=3-7/2 b=2-8/2 c=30-120/5 d=2-20", lambda a, b, c, d: (c / (a + b), c * a / (a + b) - d)),
    ("{flower+A} is {a} cm tall and grows {b} cm a week. {flower2+A} is {c} cm tall and grows "
     "{d} cm a week. After how many weeks are they equally tall?",
     "a=5-30 b=6-12 c=35-80 d=2-5", lambda a, b, c, d: ((c - a) / (b - d) - 1, (c - a) / (b - d))),
)]
# fmt: on

_PYTHON = _parse_templates("""
- {Write|Please write|Help me write} a Python function {def} that {does}. {more}
- Implement {def} in Python. It {does}. {more}
- I need a Python function that {does}. {Call it|Please name it} `{fn}`. {more}
- I am {new to coding|practising}. Show me a Python function {def} that {does}. {more}
- Write {pytest tests|unit tests|{n} assertions} for a Python function {def} that {does}.
  {|{example}} {|Explain each of them.}
- Compare {two|three} ways to write a Python function {def} that {does}. {limit}
- Which edge cases matter for a Python function {def} that {does}? Code it to handle them. {limit}
- Explain {step by step|to a beginner} how to write a Python function {def} that {does}. {more}
""")
_OTHER_CODE = _parse_templates("""
- {Write|Please write} a {|modern|plain} JavaScript function `{fn+js}({args+js})` that {does}.
- My Python function {def} {does}. {Rewrite it in|Port it to|Show it in} JavaScript. {|{example}}
- {sql} returns the {n} {who+s} with the {highest|lowest} total `{measure}`.
- {sql} shows the {average|total|largest} `{measure}` per {month|year|weekday}.
- {sql} finds every {who} with {more|fewer} than {n} rows{| in the last 30 days| this year}.
- {sql} gives the {latest|first} row of each {who}{|, without using window functions}.
- {bash} {counts the lines of|lists the {n} largest of} {files}. {|Explain each part.}
- {bash} {deletes|compresses|moves} {files} that are older than {n} days. {|Ask before each file.}
- {bash} renames {files} {to lower case|by adding today's date}. {|Explain it.|Allow a dry run.}
- {bash} prints the names of {files} that {contain the word "{error|total|draft}"|are empty}.
""")
_CHAT = _parse_templates("""
- {Explain|Please explain} {topic} to {me|a child|a teenager}. {tone} > Give an everyday example.
- Make a quiz with {n} questions about {topic} for {adults|beginners}. > Now give me the answers.
- {Find|Give me|Invent} {an analogy|a metaphor} for {topic}{| and explain it}. > Where does it fail?
- {Explain|Sum up|Tell me} the difference between {pair}. {tone} > How can I remember that?
- Write a {|short} {poem|haiku|limerick|song|riddle|lullaby} about {scene}. > Make it more hopeful.
- Write a {funny|sad|spooky} story about {role} and {scene}. > {How does it go on?|Give it a title.}
- {Act as|Pretend to be} {role}. {Introduce yourself.|How was your day?} {tone} > Any advice for me?
- Describe {scene} in {two|three|four} {funny|plain|poetic|gloomy} sentences. > Make it shorter.
- Write {a short|a polite|a formal} email to {mail}. {|Sign it as {name}.} > Make it friendlier.
- I {trouble}. {What can I do?|Any advice?|Where do I start?} {tone} > I tried that. What else?
- {How do I|What is the best way to|How can I} {howto}? {tone} > What usually goes wrong?
- {Give me|List|Suggest} {n} {idea}. > {Which do you like best, and why?|Now some unusual ones.}
- Plan a {one|two|three}-day trip to {city} {for a family|on a budget}. {tone} > What if it rains?
- What can I cook with {food}, {food2} and onions{?| in half an hour?} {tone} > I have no oven.
- {Help me learn|Make a {n}-week plan for learning} {skill}. {tone} > I have ten minutes a day.
- {Summarise|Tell me the plot of|Retell} {book} in {n} sentences. > What is its main theme?
- Summarise this {briefly|as a list}: "The {event} moves from {Monday|Friday} to {Sunday|Thursday}.
  Please bring {food}, and tell {name} if you cannot come." > Now write a {short|polite} reply.
- Write {an invitation|a flyer|a reminder} for our {event}. {|Sign it as {name}.} > Add a joke.
- {Who was|What do I need to know about} {person}? {tone} > Why does that still matter?
- Write a {short|funny|serious} letter from {person} to {role}. > Now write the reply.
- What {are the pros and cons of|is good and bad about} {habit}? {tone} {|Use examples.}
  > Which side is stronger?
- Why {why}? {tone} {|Include a fun fact.|Start with the answer.} > How do we know that?
- What does "{idiom}" mean{?|, and where is it from?| in plain English?} {tone} > Is it formal?
""")
_TEMPLATES = {"maths": _MATHS, "code": _PYTHON * 3 + _OTHER_CODE * 2, "chat": _CHAT}
