"""Every task: its stream, its splits, and what its scorer takes and refuses."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys

import pytest

from lrd_jax import tasks
from lrd_jax.errors import UserError
from lrd_jax.tasks import draw

NAMES = list(tasks.TASKS)
PINNED = 100  # Problems under each hash of GOLDEN.
FEW = 25  # Problems that the tests look at: the shape checker makes drawing slow.

# Longest answer in characters: a window of 64 tokens has room for each.
LONGEST = {
    "lists": 40,
    "code": 60,
    "sudoku": 19,
    "facts": 4,
    "arithmetic": 45,
}

# sha256 of the first 100 problems of train, validation and test with seed 0. A change
# here changes what models are trained and measured on: old numbers no longer compare.
# To make it anew: python tests/test_tasks_streams.py
GOLDEN = {
    "sort_numbers": [
        "d18723d109bd6675",
        "2f753feec8db2146",
        "e8f66b830a6ccdd1",
    ],
    "sort_words": [
        "1d892d6b82d7cdba",
        "4119a2fc17da6972",
        "45eca3e14f4fafb9",
    ],
    "reverse_list": [
        "8740b7e326fdd3b1",
        "0381226ce585e35c",
        "857189c75951982a",
    ],
    "reverse_word": [
        "287000ddb89d0df4",
        "6c12257b128662cb",
        "9d875b9a5c44ecb9",
    ],
    "filter_numbers": [
        "a2b10defb95f3273",
        "961b3415b6c48d56",
        "4e974767b9d8f052",
    ],
    "filter_words": [
        "6261abcfc05f54d3",
        "e8a6ae394db9786d",
        "01d54dd6aeac84c1",
    ],
    "copy": [
        "9884e04ffeb9551d",
        "cf2ed5c4014d09c2",
        "569db4aa777c1fcc",
    ],
    "lookup": [
        "fee5348f78a348d4",
        "54b8e3173a375b22",
        "873edb8988a9da75",
    ],
    "code_number": [
        "86bca38c5bc3bf73",
        "4657649f7c1b3312",
        "63adfd9b271ee95d",
    ],
    "code_text": [
        "65b111bf39bfa598",
        "0cc460520754dfc8",
        "5a3e3cc6777b4a48",
    ],
    "code_numbers": [
        "43004107c14c0d6f",
        "a7eae05ce41b3b29",
        "8ec00cf3c3326b98",
    ],
    "code_words": [
        "f583a763778303e1",
        "e2b05e515ae43059",
        "076ffda78fceeb6b",
    ],
    "code_if": [
        "0e29bbafd70a4153",
        "9aa393740dfeb295",
        "577e9cada3bbf7b1",
    ],
    "sudoku_easy": [
        "15934d700b8b60fb",
        "f91d4a976b9be11b",
        "2286914e1ad14370",
    ],
    "sudoku_hard": [
        "43811483c56ab85a",
        "e8522bca35e03172",
        "6bb0f158688f5d65",
    ],
    "facts": [
        "d7adf5470ef4b399",
        "79fe58b03500ae2a",
        "253507aed9bf4de1",
    ],
    "products": [
        "9809fb403cea45c7",
        "4659442d2bc7dd78",
        "ebd7ae1fbf09c4d8",
    ],
    "operations": [
        "14d5c122bd4d9fe0",
        "20dd80a892c9788f",
        "3ff61d2ab5345238",
    ],
    "expressions": [
        "98a097e5db2853b8",
        "32ca79ca00f611c8",
        "f10c8c1ffdaced51",
    ],
    "word_problems": [
        "7ea3d291b24d78e3",
        "2f7247be5394fa1c",
        "63efdca4a77f3cea",
    ],
}


def drawn(name: str, split: str, count: int) -> list[tasks.Instance]:
    stream = tasks.instances(tasks.find(name), split, seed=0)
    return list(itertools.islice(stream, count))


@functools.cache
def first(name: str, split: str) -> list[tasks.Instance]:
    return drawn(name, split, FEW)


def fingerprint(problems: list[tasks.Instance]) -> str:
    lines = [json.dumps(dataclasses.asdict(x)) for x in problems]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def elsewhere():
    """Name -> fingerprints of its splits as another process finds them, few and all."""
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(here.parent)},
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_the_stream_is_the_pinned_one(name, elsewhere):
    assert elsewhere[name]["all"] == GOLDEN[name]


@pytest.mark.parametrize("name", NAMES)
def test_another_process_draws_the_same(name, elsewhere):
    here = [fingerprint(first(name, split)) for split in tasks.SPLITS]
    assert here == elsewhere[name]["few"]


def test_another_seed_draws_others():
    task = tasks.find("sort_numbers")
    other = itertools.islice(tasks.instances(task, "train", seed=1), FEW)
    assert not {x.key for x in other} & {x.key for x in first(task.name, "train")}


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_nothing(name):
    task = tasks.find(name)
    parts = {split: first(name, split) for split in tasks.SPLITS}
    for split, part in parts.items():
        assert {task.split_of(x) for x in part} == {split}
    for a, b in itertools.combinations(parts.values(), 2):
        assert not {x.group for x in a} & {x.group for x in b}
        assert not {x.key for x in a} & {x.key for x in b}
        assert not {x.prompt for x in a} & {x.prompt for x in b}


@pytest.mark.parametrize("name", NAMES)
def test_held_out_problems_come_once(name):
    for split in ("validation", "test"):
        keys = [x.key for x in first(name, split)]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("name", NAMES)
def test_shares_of_the_splits(name):
    task, rng = tasks.find(name), random.Random(3)
    splits = {
        x.group: task.split_of(x) for x in (task.generate(rng) for _ in range(500))
    }
    held_out = sum(split != "train" for split in splits.values()) / len(splits)
    assert held_out == pytest.approx(task.held_out / 50, abs=0.07)


def test_few_problems_end_a_held_out_stream_only():
    def generate(rng: random.Random) -> tasks.Instance:
        key = str(draw.between(rng, 1, 60))
        return tasks.Instance(prompt="", answer="", payload={}, key=key, group=key)

    task = dataclasses.replace(tasks.find("copy"), generate=generate, held_out=20)
    found = {
        split: [x.key for x in itertools.islice(tasks.instances(task, split, 0), 500)]
        for split in tasks.SPLITS
    }
    assert len(found["train"]) == 500
    assert len(set(found["test"])) == len(found["test"]) > 0
    # Nothing is missing.
    assert set(itertools.chain(*found.values())) == {str(i) for i in range(1, 61)}


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_short(name):
    lengths = sorted(len(x.answer) for x in first(name, "train"))
    print(
        f"{name}: {lengths[0]} to {lengths[-1]} characters, "
        f"mean {statistics.mean(lengths):.1f}, median {lengths[len(lengths) // 2]}"
    )
    assert lengths[0] > 0
    assert lengths[-1] <= LONGEST[tasks.find(name).family]


@pytest.mark.parametrize("name", NAMES)
def test_texts_can_be_typed_and_payloads_stored(name):
    for x in first(name, "train"):
        assert (x.prompt + x.answer).replace("\n", "").isprintable()
        assert (x.prompt + x.answer).isascii()
        assert x.prompt == x.prompt.strip()
        assert x.answer == x.answer.strip()
        assert json.loads(json.dumps(x.payload)) == x.payload


@pytest.mark.parametrize("name", NAMES)
def test_reference_answers_are_right(name):
    problems = first(name, "test")
    endings = (
        "",
        "<|endoftext|><|endoftext|>",
        "<|eot_id|>1 or so",
        "\nthen more",
        "\n",
    )
    for ending in endings:
        responses = [x.answer + ending for x in problems]
        assert all(tasks.find(name).score_all(problems, responses)), ending
    assert tasks.find(name).score(problems[0], "\n " + problems[0].answer)


@pytest.mark.parametrize("name", NAMES)
def test_other_answers_are_wrong(name):
    task, problems = tasks.find(name), first(name, "test")
    changes = (
        lambda answer: "",
        lambda answer: "<|endoftext|>" + answer,
        lambda answer: answer[:-1],
        lambda answer: answer + "1",
        lambda answer: "I do not know.",
        lambda answer: "####",
        lambda answer: answer.replace(answer[-1], "§"),
    )
    responses = [change(x.answer) for change in changes for x in problems]
    right = task.score_all(problems * len(changes), responses)
    assert [r for r, good in zip(responses, right, strict=True) if good] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_to_another_problem_is_wrong(name):
    problems = first(name, "test")
    others = problems[1:] + problems[:1]
    right = tasks.find(name).score_all(problems, [x.answer for x in others])
    for x, other, good in zip(problems, others, right, strict=True):
        # Functions of one group do the same.
        assert good == (x.answer == other.answer or x.group == other.group)


def test_unknown_names():
    with pytest.raises(UserError, match="'sort_number'; did you mean sort_numbers or"):
        tasks.find("sort_number")
    with pytest.raises(UserError, match="one of train, validation, test, got 'dev'"):
        tasks.instances(tasks.find("copy"), "dev", seed=0)


def test_draws_cover_their_ranges():
    rng = random.Random(0)
    assert {draw.between(rng, -1, 2) for _ in range(100)} == {-1, 0, 1, 2}
    assert {draw.pick(rng, "abc") for _ in range(100)} == set("abc")
    orders = {tuple(draw.shuffled(rng, "abc")) for _ in range(200)}
    assert orders == set(itertools.permutations("abc"))
    assert all(len(set(draw.sample(rng, range(5), 3))) == 3 for _ in range(50))


if __name__ == "__main__":
    counts = {"few": FEW, "all": PINNED}
    found = {
        name: {
            key: [fingerprint(drawn(name, part, count)) for part in tasks.SPLITS]
            for key, count in counts.items()
        }
        for name in NAMES
    }
    print(json.dumps(found, indent=2))
