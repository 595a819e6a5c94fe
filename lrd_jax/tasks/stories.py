"""Two-step word problems with names and things, worked out as in GSM8K.

A story is a template and a plan; its numbers are drawn until no quantity on the way is
negative, or larger than people buy and lose.
"""

import random

from lrd_jax.tasks.arithmetic import (
    LARGEST,
    Tree,
    stepwise_task,
    value_of,
    written_out,
)
from lrd_jax.tasks.base import Instance
from lrd_jax.tasks.draw import between, pick, sample
from lrd_jax.tasks.vocabulary import NAMES, THINGS

# In a text: {A} and {B} are people, {t} things. The numbers a, b, c are 2 to 12, the
# numbers k and m, which multiply, 2 to 5. In the plan they are worked out left first.
# Each text has three numbers: with two there are few problems, and a model that knows
# the others by heart gets the one or two that are held out wrong.
TEMPLATES: tuple[tuple[str, Tree], ...] = (
    (
        "{A} has {a} {t}. {A} buys {b} more and gives {c} to {B}. "
        "How many {t} does {A} have now?",
        ("-", ("+", "a", "b"), "c"),
    ),
    (
        "{A} had {a} {t}, lost {b} of them and then found {c}. "
        "How many {t} does {A} have?",
        ("+", ("-", "a", "b"), "c"),
    ),
    (
        "{A} has {a} {t}. {B} has {b} more than {A}, but loses {c} of them. "
        "How many {t} does {B} have?",
        ("-", ("+", "a", "b"), "c"),
    ),
    (
        "{A} has {a} {t}. {B} has {b} fewer than {A}, but finds {c} more. "
        "How many {t} does {B} have?",
        ("+", ("-", "a", "b"), "c"),
    ),
    (
        "{A} buys {k} boxes with {m} {t} each and gives {c} {t} away. "
        "How many {t} are left?",
        ("-", ("*", "k", "m"), "c"),
    ),
    (
        "{A} has {a} {t} and buys {k} bags of {m} {t}. "
        "How many {t} does {A} have in total?",
        ("+", "a", ("*", "k", "m")),
    ),
    (
        "There are {a} {t} on a table. {A} takes {b} and {B} takes {c}. "
        "How many {t} are left on the table?",
        ("-", ("-", "a", "b"), "c"),
    ),
    (
        "{A} finds {a} {t} on Monday, {b} on Tuesday and {c} on Friday. "
        "How many {t} is that?",
        ("+", ("+", "a", "b"), "c"),
    ),
    (
        "{A} has {m} {t}. {B} has {k} times as many and gets {b} more. "
        "How many {t} does {B} have?",
        ("+", ("*", "m", "k"), "b"),
    ),
    (
        "{A} has {m} {t}. {B} has {k} times as many and sells {b} of them. "
        "How many {t} does {B} keep?",
        ("-", ("*", "m", "k"), "b"),
    ),
    (
        "{A} sells {k} {t} a day for {m} days and had {a} {t} at first. "
        "How many {t} are left?",
        ("-", "a", ("*", "k", "m")),
    ),
    (
        "{A} and {B} collect {t}. {A} has {a} and {B} has {b}. Together they sell {c}. "
        "How many {t} do they keep?",
        ("-", ("+", "a", "b"), "c"),
    ),
    (
        "A shop has {a} {t}. It sells {b} to {A} and gets {c} new ones. "
        "How many {t} does the shop have now?",
        ("+", ("-", "a", "b"), "c"),
    ),
    (
        "{A} packs {a} {t}, {B} packs {b} and breaks {c} of all these. "
        "How many {t} are packed and whole?",
        ("-", ("+", "a", "b"), "c"),
    ),
    (
        "{A} makes {a} {t} each day and breaks {b} of them. "
        "How many {t} are whole after {k} days?",
        ("*", ("-", "a", "b"), "k"),
    ),
    (
        "One of the {t} costs {k} dollars. {A} buys {m} and pays with {a} dollars. "
        "How many dollars does {A} get back?",
        ("-", "a", ("*", "k", "m")),
    ),
    (
        "{A} saves {k} dollars a week for {m} weeks and gets {b} dollars from {B}. "
        "How many dollars does {A} have?",
        ("+", ("*", "k", "m"), "b"),
    ),
    (
        "{A} needs {a} {t}. {A} has {b} and {B} brings {c}. "
        "How many {t} are still missing?",
        ("-", ("-", "a", "b"), "c"),
    ),
    (
        "{A} is {a} years old. {B} is {b} years older. "
        "How old will {B} be in {c} years?",
        ("+", ("+", "a", "b"), "c"),
    ),
    (
        "{A} is {a} years old and {B} is {b} years younger. "
        "How old will {B} be in {c} years?",
        ("+", ("-", "a", "b"), "c"),
    ),
    (
        "A train has {k} cars with {m} people each. At the station {b} more get on. "
        "How many people are on the train?",
        ("+", ("*", "k", "m"), "b"),
    ),
    (
        "{A} has to read {a} pages and reads {b} on the first day and {c} on the next. "
        "How many pages are left?",
        ("-", ("-", "a", "b"), "c"),
    ),
    (
        "A book has {a} pages. {A} reads {k} pages a day for {m} days. "
        "How many pages are left?",
        ("-", "a", ("*", "k", "m")),
    ),
    (
        "{A} puts {a} {t} into each of {k} boxes, then takes out {b} in all. "
        "How many {t} are in the boxes?",
        ("-", ("*", "a", "k"), "b"),
    ),
)


def _story(rng: random.Random) -> Instance:
    number = between(rng, 0, len(TEMPLATES) - 1)
    template, plan = TEMPLATES[number]
    while True:
        values = {name: between(rng, 2, LARGEST) for name in "abc"}
        values |= {name: between(rng, 2, 5) for name in "km"}
        steps: list[str] = []
        value = value_of(plan, values, steps)
        on_the_way = [int(step.rpartition(" ")[2]) for step in steps]
        if min(on_the_way) >= 0 and max(on_the_way) <= LARGEST:
            break
    # Only what the story tells: the other numbers are not part of the problem.
    told = {name: n for name, n in values.items() if f"{{{name}}}" in template}
    (a, b), thing = sample(rng, NAMES, 2), pick(rng, THINGS)
    prompt = template.format(A=a, B=b, t=thing, **told)
    return Instance(
        prompt=prompt,
        answer=written_out(steps, value),
        payload={"answer": value},
        key=f"story: {prompt}",
        # Another name or thing makes no new problem.
        group=f"story: {number} {sorted(told.items())}",
    )


# With 5 %, 1000 problems of test would be few in different names.
TASKS = (stepwise_task("word_problems", _story, held_out=10),)
