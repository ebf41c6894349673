"""A small world of people who count things, told as stories and asked as word problems.

The quickstart pretrains a tiny model on the stories and fine-tunes it on the problems. Both tell
what happens in the same words, so the base model knows the arithmetic. Only the stories never ask:
fine-tuning has to teach it to be asked and to answer briefly.

Everything follows from explicit seeds:

    python train/quickstart/world.py               # writes data/{train,validation,test}.jsonl
    python train/quickstart/world.py --tokenizer   # writes base/tokenizer.json and its config
"""

import argparse
import itertools
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent

MOST = 40  # nobody in this world counts further
VOCABULARY = 512

# split: (rows, seed). The stories of seed 0 train the tokenizer; pretraining may use any seed.
SPLITS = {"train": (6000, 1), "validation": (200, 2), "test": (200, 3)}

WOMEN = ("Ada", "Amy", "Ann", "Eva", "Ida", "Ivy", "Joy", "Kim", "Lea", "Mia", "Una", "Zoe")
MEN = ("Ben", "Bob", "Dan", "Eli", "Jon", "Leo", "Max", "Ned", "Ron", "Sam", "Tim", "Tom")
PEOPLE = tuple((name, "she") for name in WOMEN) + tuple((name, "he") for name in MEN)

FOODS = (
    ("plum", "plums"), ("pear", "pears"), ("fig", "figs"), ("nut", "nuts"), ("egg", "eggs"),
    ("bun", "buns"), ("cake", "cakes"), ("pie", "pies"), ("bean", "beans"), ("lime", "limes"),
    ("apple", "apples"), ("cherry", "cherries"),
)  # fmt: skip
THINGS = (
    ("ball", "balls"), ("book", "books"), ("cup", "cups"), ("coin", "coins"), ("hat", "hats"),
    ("pen", "pens"), ("bell", "bells"), ("kite", "kites"), ("card", "cards"), ("ring", "rings"),
    ("shell", "shells"), ("box", "boxes"),
)  # fmt: skip
COLOURS = ("red", "blue", "green", "pink", "black", "white", "brown", "grey", "gold", "yellow")
PLACES = (
    "park", "lake", "farm", "shop", "mill", "market", "beach", "bridge", "barn", "pond", "fair",
    "river", "school", "hill", "well", "house",
)  # fmt: skip

# Templates. {A} and {B} are people (where something is given, A gives it to B), {she} and {She}
# stand for A, {s} is the plural noun, {k} an amount that changes hands and {r} one that results.
# Stories and problems share those up to GIVES.
STARTS = (
    "{A} has {n}",
    "{A} has {n}",
    "{A} has {n} in a {colour} bag",
    "{A} brings {n} to the {place}",
    "{A} counts {n}",
    "At the {place}, {A} has {n}",
)
PAIR_STARTS = (
    "{P} has {p}. {Q} has {q}.",
    "{P} has {p} and {Q} has {q}.",
    "{P} has {p} and {Q} has {q_bare}.",
    "{P} has {p}, while {Q} has {q}.",
    "At the {place}, {P} has {p} and {Q} has {q}.",
)
LINKS = (". {A} ", ". {She} ", ". Then {she} ", " and ")
GAINS = ("finds {k}", "buys {k}", "gets {k}", "wins {k}", "picks up {k}")
LOSSES = ("loses {k}", "sells {k}", "gives away {k}", "throws away {k}")
MEALS = ("eats {k}", "eats {k}", *LOSSES)
GIFTS = ("gives {k} to {B}", "gives {B} {k}", "hands {k} to {B}", "sells {k} to {B}")
GIVES = (*(f"{{A}} {gift}." for gift in GIFTS), "{B} gets {k} from {A}.")

# Results are stated in the stories alone. Several put the number last, after the words that say
# what it counts, since that is the order of a question and its answer.
MORE = (
    "Now {x} has {r}.",
    "{X} has {r} now.",
    "{X} now has {r}.",
    "{X} has {r} in all.",
    "In all {x} has {r}.",
    "So {x} has {r}.",
    "What {x} has now is {r}.",
)
LESS = (
    "Now {x} has {r}.",
    "{X} has {r} left.",
    "{X} still has {r}.",
    "{X} keeps {r}.",
    "So {x} has {r} left.",
    "That leaves {A} with {r}.",
    "What {x} has left is {r}.",
)
SAME = ("{B} still has {r}.", "And {B} still has {r}.", "{B} has {r} as before.")
TOTALS = (
    "Together they have {r}.",
    "They have {r} together.",
    "In all they have {r}.",
    "They have {r} in all.",
    "{A} and {B} have {r} together.",
    "{A} and {B} have {r} in all.",
    "What they have together is {r}.",
)
COMPARISONS = (
    "{P} has {more} than {Q}.",
    "{Q} has {fewer} than {P}.",
    "{P} has more {s} than {Q}. {P} is ahead by {r}.",
    "{Q} has fewer {s} than {P}. {Q} is behind by {r}.",
    "{P} is ahead of {Q} by {r}.",
    "{Q} is behind {P} by {r}.",
    "{Q} needs {more} to have the same as {P}.",
)
EQUALS = ("{A} and {B} have the same.", "{A} has the same as {B}.")
BAGS = (
    "{A} has {m} in a {colour} bag and {n} in a {colour2} bag.",
    "{A} has {m} in a {colour} bag. {She} also has {n} in a {colour2} bag.",
)

# Scenery names nobody, so it can stand anywhere in a story without confusing a "she".
SCENERY = (
    "It is a sunny day.",
    "It rains at the {place}.",
    "The {place} is quiet.",
    "The flag is {colour}.",
    "The {place} is near the {place2}.",
    "The bag is {colour}.",
    "The {s} are from the {place}.",
    "The way to the {place} is long.",
)
SMALL_TALK = (
    "{A} walks to the {place}.",
    "{A} and {B} meet at the {place}.",
    "{A} likes {s}.",
    "{A} does not like the rain.",
    "{A} does not have a {colour} bag.",
    "{A} sits near the {place}.",
    "{A} runs around the {place}.",
    "{A} shows {B} a {colour} bag.",
    "{B} sees {A} at the {place}.",
    "{A} and {B} do not go to the {place2}.",
    "{B} has a {colour} bag for the {s}.",
)

QUESTIONS = {
    "gain": (
        "How many {s} does {A} have now?",
        "How many {s} does {A} have in all?",
        "How many {s} does {she} have now?",
    ),
    "loss": (
        "How many {s} does {A} have left?",
        "How many {s} does {A} still have?",
        "How many {s} does {she} have left?",
    ),
    "give": (
        "How many {s} does {A} have left?",
        "How many {s} does {A} still have?",
        "How many {s} does {A} keep?",
    ),
    "total": (
        "How many {s} do they have together?",
        "How many {s} do they have in all?",
        "How many {s} do {A} and {B} have together?",
    ),
    "difference": (
        "How many more {s} does {A} have than {B}?",
        "How many fewer {s} does {B} have than {A}?",
        "By how many {s} is {A} ahead of {B}?",
    ),
}
ADDS = ("gain", "total")


class Tale:
    """Two people and one kind of thing, and the ways to speak of them."""

    def __init__(self, rng: random.Random) -> None:
        """Casts the tale.

        Args:
            rng: Draws the people, the noun and, later, every phrase.
        """
        self.rng = rng
        (a, she), (b, _) = rng.sample(PEOPLE, 2)
        self.is_food = rng.random() < 0.5
        self.one, self.many = rng.choice(FOODS if self.is_food else THINGS)
        place, place2 = rng.sample(PLACES, 2)
        colour, colour2 = rng.sample(COLOURS, 2)
        self.words = {
            "A": a,
            "B": b,
            "she": she,
            "She": she.capitalize(),
            "s": self.many,
            "place": place,
            "place2": place2,
            "colour": colour,
            "colour2": colour2,
        }

    def say(self, templates: Sequence[str], **slots: str) -> str:
        """Fills one of the templates.

        Args:
            templates: The choices.
            **slots: Words for this template beside those of the tale.

        Returns:
            The phrase.
        """
        return self.rng.choice(templates).format(**self.words, **slots)

    def amount(self, n: int, how: str = "") -> str:
        """Names an amount, as in "5 plums" or, with how="more", "5 more plums"."""
        noun = self.one if n == 1 else self.many
        return f"{n} {how} {noun}" if how else f"{n} {noun}"

    def alone(self, n: int, kind: str, k: int) -> str:
        """Tells that A has n and then gains, loses or gives k."""
        start = self.say(STARTS, n=self.amount(n))
        return start + self.say(LINKS) + self.act(kind, k) + "."

    def act(self, kind: str, k: int) -> str:
        """Says what A does with k things, without its subject."""
        verbs: tuple[str, ...]
        forms: tuple[str, ...]
        if kind == "gain":
            verbs, forms = GAINS, (self.amount(k), self.amount(k, "more"), f"{k} more")
        else:
            losses = MEALS if self.is_food else LOSSES
            verbs = GIFTS if kind == "give" else losses
            forms = (self.amount(k), self.amount(k), f"{k} of them", f"{k}")
        return self.say(verbs, k=self.rng.choice(forms))

    def pair(self, a: int, b: int) -> str:
        """Tells that A has a and B has b, in either order."""
        (p, m), (q, n) = self.rng.sample([(self.words["A"], a), (self.words["B"], b)], 2)
        return self.say(PAIR_STARTS, P=p, p=self.amount(m), Q=q, q=self.amount(n), q_bare=str(n))

    def give(self, k: int) -> str:
        """Tells that A gives k to B, where both have some."""
        return self.say(GIVES, k=self.amount(k))

    def result(self, templates: Sequence[str], n: int, who: str = "A") -> str:
        """States what somebody has in the end.

        Args:
            templates: The ways to state it.
            n: How many.
            who: The slot of the person: "A", "B" or "she".
        """
        x = self.words[who]
        return self.say(templates, x=x, X=x.capitalize(), r=self.amount(n))

    def total(self, a: int, b: int) -> str:
        """States the sum of what A and B have."""
        return self.say(TOTALS, r=self.amount(a + b))

    def comparison(self, a: int, b: int) -> str:
        """States by how much A, who has a, is ahead of B, who has b, or the other way round."""
        if a == b:
            return self.say(EQUALS)
        p, q = ("A", "B") if a > b else ("B", "A")
        n = abs(a - b)
        return self.say(
            COMPARISONS,
            P=self.words[p],
            Q=self.words[q],
            r=self.amount(n),
            more=self.amount(n, "more"),
            fewer=self.amount(n, "fewer"),
        )


def stories(seed: int) -> Iterator[str]:
    """Tells short stories without end; none of them asks anything.

    Args:
        seed: Decides all of the stories.

    Yields:
        One story of some one to five sentences.
    """
    rng = random.Random(seed)
    shapes = (_story_of_one, _story_of_two, _story_of_bags, _story_of_places)
    weights = (40, 50, 4, 6)
    while True:
        shape = rng.choices(shapes, weights)[0]
        tale = Tale(rng)
        parts = shape(tale)
        # A sentence between an event and its result makes the base carry the state over it, as it
        # must later carry it over the question.
        if rng.random() < 0.2:
            parts.insert(rng.randint(0, len(parts)), tale.say(SCENERY))
        yield " ".join(parts)


def _story_of_one(tale: Tale) -> list[str]:
    rng = tale.rng
    n = rng.randint(1, MOST)
    kind, k = _change(rng, n, "give")
    parts = [tale.alone(n, kind, k)]
    n += k if kind == "gain" else -k
    parts.append(_outcome(tale, kind, n))
    if rng.random() < 0.4:
        kind, k = _change(rng, n, "give")
        n += k if kind == "gain" else -k
        parts.append(tale.say(("Then {she} ", "Then {A} ", "Later {A} ")) + tale.act(kind, k) + ".")
        parts.append(_outcome(tale, kind, n))
    return parts


def _change(rng: random.Random, n: int, *others: str) -> tuple[str, int]:
    """Draws what happens to somebody who has n: a gain, a loss or one of the other ways to lose."""
    kinds = ("gain",) * (n < MOST) + ("loss", *others) * (n > 0)
    kind = rng.choice(kinds)
    return kind, rng.randint(1, MOST - n if kind == "gain" else n)


def _outcome(tale: Tale, kind: str, n: int) -> str:
    # "Tom gives 5 plums to Ben. He has 9 left." could be either of them: a gift names the giver.
    who = "A" if kind == "give" or tale.rng.random() < 0.6 else "she"
    return tale.result(MORE if kind == "gain" else LESS, n, who)


def _story_of_two(tale: Tale) -> list[str]:
    rng = tale.rng
    a, b = rng.randint(1, MOST), rng.randint(1, MOST)
    parts = [tale.pair(a, b)]
    event = rng.choice(("give", "give", "change", "none", "none"))
    if event == "give" and b < MOST:
        k = rng.randint(1, min(a, MOST - b))
        a, b = a - k, b + k
        parts.append(tale.give(k))
        results = [tale.result(LESS, a, "A"), tale.result(MORE, b, "B")]
        parts += rng.sample(results, rng.choice((1, 2, 2)))
    elif event == "change":
        kind, k = _change(rng, a)
        a += k if kind == "gain" else -k
        parts.append(tale.say(("{A} ", "Then {A} ")) + tale.act(kind, k) + ".")
        parts.append(tale.result(MORE if kind == "gain" else LESS, a))
        if rng.random() < 0.3:
            parts.append(tale.say(SAME, r=tale.amount(b)))
    views = [tale.comparison(a, b)]
    if a + b <= MOST:
        views.append(tale.total(a, b))
    if len(parts) == 1:
        parts += rng.sample(views, rng.randint(1, len(views)))
    elif len(parts) == 3 and rng.random() < 0.4:
        parts.append(rng.choice(views))
    return parts


def _story_of_bags(tale: Tale) -> list[str]:
    rng = tale.rng
    m = rng.randint(1, MOST - 1)
    n = rng.randint(1, MOST - m)
    return [
        tale.say(BAGS, m=tale.amount(m), n=tale.amount(n)),
        tale.result(MORE, m + n, rng.choice(("A", "she"))),
    ]


def _story_of_places(tale: Tale) -> list[str]:
    rng = tale.rng
    return [line.format(**tale.words) for line in rng.sample(SMALL_TALK, rng.choice((2, 3)))]


def split_of(kind: str, a: int, b: int) -> str:
    """Assigns the two numbers of a problem to a split, so that no other split asks about them.

    The order of the numbers does not matter: 3 + 5 learnt would give 5 + 3 away.

    Args:
        kind: The kind of problem.
        a: One number.
        b: The other number.

    Returns:
        "validation" and "test" for 10 % of the number pairs each, else "train".
    """
    draw = zlib.crc32(f"{kind} {min(a, b)} {max(a, b)}".encode()) % 10
    return ("validation", "test")[draw] if draw < 2 else "train"


def problems(seed: int, split: str = "train") -> Iterator[dict[str, str]]:
    """Asks word problems without end; they may repeat.

    Args:
        seed: Decides all of the problems.
        split: "train", "validation" or "test", see `split_of`.

    Yields:
        A problem as {"prompt": ..., "completion": ...}.
    """
    rng = random.Random(seed)
    pairs = {kind: [p for p in _pairs(kind) if split_of(kind, *p) == split] for kind in QUESTIONS}
    while True:
        kind = rng.choice(tuple(QUESTIONS))
        a, b = rng.choice(pairs[kind])
        tale = Tale(rng)
        text = _setting(tale, kind, a, b)
        answer = tale.amount(a + b if kind in ADDS else a - b)
        yield {
            "prompt": f"{text} {tale.say(QUESTIONS[kind])}\nAnswer:",
            "completion": f" {answer}",
        }


def _pairs(kind: str) -> list[tuple[int, int]]:
    """Lists the numbers that a kind of problem can ask about."""
    grid = itertools.product(range(1, MOST + 1), repeat=2)
    return [(a, b) for a, b in grid if (a + b <= MOST if kind in ADDS else a > b)]


def _setting(tale: Tale, kind: str, a: int, b: int) -> str:
    """Tells what a problem asks about, in the words of the stories."""
    return tale.pair(a, b) if kind in ("total", "difference") else tale.alone(a, kind, b)


def write_data(folder: Path) -> None:
    """Writes the problems of every split.

    Args:
        folder: Takes train.jsonl, validation.jsonl and test.jsonl.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, (rows, seed) in SPLITS.items():
        unique: dict[str, str] = {}
        for problem in problems(seed, split):
            unique.setdefault(problem["prompt"], json.dumps(problem))
            if len(unique) == rows:
                break
        text = "".join(f"{line}\n" for line in unique.values())
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def write_tokenizer(folder: Path) -> None:
    """Trains the tokenizer on stories and writes it for `AutoTokenizer.from_pretrained`.

    Args:
        folder: Takes tokenizer.json and tokenizer_config.json.
    """
    # Here, since whoever only wants text need not have these.
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    # Every digit stands alone, the first with the space before it: " 14" is " 1" and "4".
    words = Regex(r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        itertools.islice(stories(seed=0), 20_000),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def main() -> None:
    """Writes the data or, if asked, the tokenizer beside this file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tokenizer", action="store_true", help="write the tokenizer instead")
    if parser.parse_args().tokenizer:
        write_tokenizer(HERE / "base")
    else:
        write_data(HERE / "data")


if __name__ == "__main__":
    main()
