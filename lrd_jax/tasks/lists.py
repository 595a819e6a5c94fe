"""Lists and strings: sort, reverse, filter, copy and look up.

A list is written with commas; an empty one is answered by `none`. Sorting and reversing
change no item, so all that is asked for is already in the prompt. No item of a list
to sort or filter stands there twice: the one written last tells which is next.
"""

import random
import re
from collections.abc import Callable, Sequence

from lrd_jax.tasks.base import Instance, Payload, Task, first_line, one_by_one
from lrd_jax.tasks.draw import between, chance, pick, sample
from lrd_jax.tasks.vocabulary import WORDS

# Sentences with {items}; the one drawn is no part of the problem's key.
_SORT_UP = (
    "Sort these numbers: {items}",
    "Sort from small to large: {items}",
)
_SORT_DOWN = (
    "Sort these numbers downwards: {items}",
    "Sort from large to small: {items}",
)
_SORT_WORDS = (
    "Sort these words: {items}",
    "Sort alphabetically: {items}",
)
_REVERSE_LIST = (
    "Reverse this list: {items}",
    "Write this list backwards: {items}",
)
_REVERSE_LETTERS = (
    "Reverse these letters: {items}",
    "Write these letters backwards: {items}",
)
_FILTER_NUMBERS = (
    "Keep the numbers that are {rule}: {items}",
    "List the numbers that are {rule}: {items}",
)
_FILTER_WORDS = (
    "Keep the words that {rule}: {items}",
    "List the words that {rule}: {items}",
)
_COPY = (
    "Copy this: {items}",
    "Repeat this: {items}",
)
_LOOKUP = (
    "Find the word that {rule}: {items}",
    "Look up the word that {rule}: {items}",
)
LARGEST = 20  # Of the numbers to sort, reverse or copy.
_LARGEST_TO_FILTER = 40  # More, so that no set of them is learned by heart.
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _join(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _instance(
    prompt: str, *, name: str, problem: str, answer: str, group: str | None = None
) -> Instance:
    key = f"{name}: {problem}"
    return Instance(
        prompt=prompt,
        answer=answer,
        payload={"answer": answer},
        key=key,
        group=key if group is None else f"{name}: {group}",
    )


def _numbers(rng: random.Random) -> list[int]:
    return sample(rng, range(LARGEST + 1), between(rng, 3, 4))


def _words(rng: random.Random) -> list[str]:
    return sample(rng, WORDS, between(rng, 3, 4))


def _sort_numbers(rng: random.Random) -> Instance:
    numbers = _numbers(rng)
    down = chance(rng, 0.4)
    prompt = pick(rng, _SORT_DOWN if down else _SORT_UP).format(items=_join(numbers))
    return _instance(
        prompt,
        name="sort_numbers",
        problem=f"{'down' if down else 'up'} {_join(numbers)}",
        answer=_join(sorted(numbers, reverse=down)),
        # The same numbers in another order have the same answer.
        group=_join(sorted(numbers)),
    )


def _sort_words(rng: random.Random) -> Instance:
    words = _words(rng)
    return _instance(
        pick(rng, _SORT_WORDS).format(items=_join(words)),
        name="sort_words",
        problem=_join(words),
        answer=_join(sorted(words)),
        group=_join(sorted(words)),
    )


def _reverse_list(rng: random.Random) -> Instance:
    items: Sequence[object]
    if chance(rng, 0.5):
        items = _numbers(rng)
    else:
        items = _words(rng)
    return _instance(
        pick(rng, _REVERSE_LIST).format(items=_join(items)),
        name="reverse_list",
        problem=_join(items),
        answer=_join(items[::-1]),
    )


def _reverse_letters(rng: random.Random) -> Instance:
    letters = [pick(rng, _LETTERS) for _ in range(between(rng, 3, 6))]
    text = "-".join(letters)
    return _instance(
        pick(rng, _REVERSE_LETTERS).format(items=text),
        name="reverse_letters",
        problem=text,
        answer=text[::-1],
    )


def _filter(
    rng: random.Random,
    *,
    name: str,
    frames: Sequence[str],
    items: Sequence[object],
    rules: Sequence[tuple[str, Callable[..., bool]]],
) -> Instance:
    rule, keeps = pick(rng, rules)
    kept = [item for item in items if keeps(item)]
    if not kept and chance(rng, 0.8):  # Else `none` would be a good guess.
        keeper = pick(rng, [r for r in rules if any(r[1](item) for item in items)])
        rule, kept = keeper[0], [item for item in items if keeper[1](item)]
    return _instance(
        pick(rng, frames).format(rule=rule, items=_join(items)),
        name=name,
        problem=f"{rule} {_join(items)}",
        answer=_join(kept) or "none",
        # Another order, or another rule, keeps the same items for the like reasons.
        group=_join(sorted(map(str, items))),
    )


def _filter_numbers(rng: random.Random) -> Instance:
    rules: list[tuple[str, Callable[[int], bool]]] = [
        ("even", lambda n: n % 2 == 0),
        ("odd", lambda n: n % 2 == 1),
    ]
    return _filter(
        rng,
        name="filter_numbers",
        frames=_FILTER_NUMBERS,
        items=sample(rng, range(_LARGEST_TO_FILTER + 1), between(rng, 3, 4)),
        rules=rules,
    )


def _filter_words(rng: random.Random) -> Instance:
    words = _words(rng)
    first, last = pick(rng, words)[0], pick(rng, words)[-1]
    rules: list[tuple[str, Callable[[str], bool]]] = [
        (f"start with {first}", lambda w: w[0] == first),
        (f"end with {last}", lambda w: w[-1] == last),
    ]
    return _filter(
        rng, name="filter_words", frames=_FILTER_WORDS, items=words, rules=rules
    )


def _copy(rng: random.Random) -> Instance:
    items = [
        str(between(rng, 0, LARGEST)) if chance(rng, 0.3) else pick(rng, WORDS)
        for _ in range(between(rng, 2, 5))
    ]
    text = pick(rng, (", ", "-")).join(items)
    return _instance(
        pick(rng, _COPY).format(items=text), name="copy", problem=text, answer=text
    )


def _lookup(rng: random.Random) -> Instance:
    """One word by its first or its last letter, which no other word of the list has."""
    place, verb = pick(rng, ((0, "starts"), (-1, "ends")))
    while True:
        words = _words(rng)
        wanted = pick(rng, words)
        if [word[place] for word in words].count(wanted[place]) == 1:
            break
    rule = f"{verb} with {wanted[place]}"
    return _instance(
        pick(rng, _LOOKUP).format(rule=rule, items=_join(words)),
        name="lookup",
        problem=f"{rule} {_join(words)}",
        answer=wanted,
        group=_join(sorted(words)),
    )


def _same_items(payload: Payload, answer: str) -> bool:
    """Same items in the same order; commas, brackets and quotes do not count."""
    want, got = (re.findall(r"[^\s,\[\]'\"]+", t) for t in (payload["answer"], answer))
    return want == got


def _same_text(payload: Payload, answer: str) -> bool:
    return answer == payload["answer"]


def _task(
    name: str,
    generate: Callable[[random.Random], Instance],
    judge: Callable[[Payload, str], bool] = _same_items,
) -> Task:
    return Task(
        name=name,
        family="lists",
        generate=generate,
        extract=first_line,
        grade=one_by_one(judge),
    )


TASKS = (
    _task("sort_numbers", _sort_numbers),
    _task("sort_words", _sort_words),
    _task("reverse_list", _reverse_list),
    _task("reverse_letters", _reverse_letters, _same_text),
    _task("filter_numbers", _filter_numbers),
    _task("filter_words", _filter_words),
    _task("copy", _copy, _same_text),
    _task("lookup", _lookup),
)
