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
FEW = 25  # Problems that the tests look at.

# Longest answer in characters: a window of 64 tokens has room for each.
LONGEST = {
    "lists": 45,
    "code": 60,
    "sudoku": 19,
    "facts": 51,
    "arithmetic": 50,
}

# sha256 of the first 100 problems of train, validation and test with seed 0. A change
# here changes what models are trained and measured on: old numbers no longer compare.
# To make it anew: python tests/test_tasks_streams.py
GOLDEN = {
    "sort_numbers": ["62c46630bbd66f25", "3b02c2102cdafc8c", "4d20df11074191d5"],
    "sort_words": ["bf32db9a25a502ad", "2c6daed79db2332c", "0d6ac6aa1b24e662"],
    "reverse_list": ["b0fea4af80d23436", "08fdea31a34a49ac", "1220c3763cbff36b"],
    "reverse_letters": ["2d91651074f2e8e2", "2707cdafd12cc198", "1245a412f5760f4c"],
    "filter_numbers": ["2b90dca6712ba0d4", "1b0e0a6016eb7dbc", "c8929a230cf90ebf"],
    "filter_words": ["4896d56c27bf2b9c", "3f47c5c1dfdc0e84", "5cf81794183f2744"],
    "copy": ["1ce3c66d2fbdf63d", "83255f1f7976b3cf", "cbd0a0632b4dfe07"],
    "lookup": ["ba66f152daf78b40", "f632b65da1877d71", "6f2505a9cc02df2a"],
    "code_number": ["80a6940fd77aa667", "4fe92e29d3ff2d8f", "c80b6e47657b40d4"],
    "code_text": ["54c9ed87344f2a07", "753be4ff1276d047", "0ef4b215b313ce62"],
    "code_numbers": ["18667d1c0c9473e7", "7da7330f1945eb11", "682dc37cc152cb5e"],
    "code_words": ["ba0f904ae83c5cc9", "c28f38408f920200", "1167fe47883b25ce"],
    "code_if": ["bbc22033db2f5371", "432f4c465525674d", "d7738ea26cd92f99"],
    "sudoku_easy": ["04ccf7dfd19b744f", "653061031780d64b", "04cdd41b9a49ffe1"],
    "sudoku_hard": ["2834439a7b22627e", "75ff420029859db3", "3b40707b3b6ba746"],
    "facts": ["4db5d8f46632e9a9", "2df6df5db90d8179", "158bb297c5081906"],
    "products": ["37acc4b3e303008a", "bdd00f004c60991b", "a361f844ad12e633"],
    "operations": ["c6261ee9d4ddb7d0", "3213475920fd236e", "e157f20a92a4a529"],
    "equations": ["7533f536dc1ca941", "f37ee2b8b2f52af9", "3f47cd02ad408c89"],
    "pairs": ["06196ea778be56f9", "087ad13d80920695", "fa55b669203804ff"],
    "expressions": ["87822bf9d7cce6f6", "04f25b23569b4054", "5d306cc49d2148a5"],
    "word_problems": ["cbbfef68cc7e160d", "5c6f85f5d4eaeb46", "bc5341945410ce15"],
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
        # Functions of one group do the same; of steps only what they come to counts.
        same = x.payload == other.payload or x.group == other.group
        assert good == (same or x.answer == other.answer)


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
