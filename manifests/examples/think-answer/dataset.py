"""Makes the example's dataset: short questions of arithmetic and order, each with its reasoning and its answer.

    python dataset.py [--rows 400] [--seed 0] > train.jsonl

Deterministic, standard library only, and the project's own work (Apache-2.0). The columns are those of
SkunkworksAI/reasoning-0.01: instruction, reasoning, output. Rows are short, so that a small model learns the form,
think first and then answer, within minutes on a CPU; whether it calculates well is another matter.
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jon", "Kim", "Lena", "Max", "Nora")
THINGS = ("apples", "books", "coins", "pencils", "stamps", "shells", "cards", "buttons", "cookies", "stones")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
CONTAINERS = ("box", "bag", "jar", "drawer", "basket", "bowl")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TRAITS = (("taller", "tallest"), ("older", "oldest"), ("faster", "fastest"), ("stronger", "strongest"))

Row = tuple[str, str, str]
"""Question, reasoning, answer."""


def together(draw: random.Random) -> Row:
    container, thing = draw.choice(CONTAINERS), draw.choice((*THINGS, "marbles"))
    one, other = draw.sample(COLOURS, 2)
    first, second = draw.randint(2, 9), draw.randint(2, 9)
    return (
        f"A {container} holds {first} {one} and {second} {other} {thing}. How many {thing} are in the {container}?",
        f"There are {first} {one} and {second} {other} {thing}. {first} + {second} = {first + second}.",
        f"There are {first + second} {thing} in the {container}.",
    )


def gain(draw: random.Random) -> Row:
    name, thing, first, second = draw.choice(NAMES), draw.choice(THINGS), draw.randint(3, 20), draw.randint(2, 9)
    return (
        f"{name} has {first} {thing} and gets {second} more. How many {thing} does {name} have now?",
        f"{name} starts with {first} and gets {second} more. {first} + {second} = {first + second}.",
        f"{name} has {first + second} {thing}.",
    )


def loss(draw: random.Random) -> Row:
    name, thing, second, rest = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 9), draw.randint(2, 12)
    return (
        f"{name} has {second + rest} {thing} and gives away {second}. How many {thing} are left?",
        f"{name} gives away {second} of {second + rest}. {second + rest} - {second} = {rest}.",
        f"{name} has {rest} {thing} left.",
    )


def price(draw: random.Random) -> Row:
    thing, count, each = draw.choice(THINGS), draw.randint(2, 9), draw.randint(2, 9)
    return (
        f"One of the {thing} costs {each} dollars. What do {count} of them cost?",
        f"{count} times {each} dollars is the price. {count} x {each} = {count * each}.",
        f"They cost {count * each} dollars.",
    )


def share(draw: random.Random) -> Row:
    thing, people, each = draw.choice(THINGS), draw.randint(2, 6), draw.randint(2, 9)
    return (
        f"{people} friends share {people * each} {thing} equally. How many does each friend get?",
        f"Divide {people * each} by {people}. {people * each} / {people} = {each}.",
        f"Each friend gets {each} {thing}.",
    )


def order(draw: random.Random) -> Row:
    (more, most), (first, second, third) = draw.choice(TRAITS), draw.sample(NAMES, 3)
    return (
        f"{first} is {more} than {second}. {second} is {more} than {third}. Who is the {most}?",
        f"{first} is above {second}, and {second} is above {third}, so nobody is above {first}.",
        f"{first} is the {most}.",
    )


def day(draw: random.Random) -> Row:
    today, later = draw.randrange(7), draw.randint(2, 5)
    passed = [DAYS[(today + step) % 7] for step in range(1, later + 1)]
    return (
        f"Today is {DAYS[today]}. Which day is it in {later} days?",
        f"The days after {DAYS[today]} are {', '.join(passed)}.",
        f"In {later} days it is {passed[-1]}.",
    )


def sequence(draw: random.Random) -> Row:
    start, step = draw.randint(1, 12), draw.randint(2, 6)
    shown = [start + step * index for index in range(4)]
    return (
        f"Which number comes next: {', '.join(map(str, shown))}?",
        f"Each number is {step} more than the one before. {shown[-1]} + {step} = {shown[-1] + step}.",
        f"The next number is {shown[-1] + step}.",
    )


KINDS: tuple[Callable[[random.Random], Row], ...] = (together, gain, loss, price, share, order, day, sequence)


def rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    """As many different questions as asked for, every kind in turn."""
    draw, seen = random.Random(seed), set[str]()  # noqa: S311
    for kind in itertools.cycle(KINDS):
        if len(seen) == count:
            return
        question, reasoning, answer = kind(draw)
        if question not in seen:
            seen.add(question)
            yield {"instruction": question, "reasoning": reasoning, "output": answer}


def main() -> None:
    """Write the rows to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for row in rows(arguments.rows, arguments.seed):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
