"""Batches: what is in them, that they fit, and that they follow from the step alone."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from lrd_jax.tasks import TASKS, instances
from lrd_jax.text import encode_prompt
from lrd_jax.tokenizer import Tokenizer
from lrd_jax.training import data, vocabulary
from lrd_jax.training.data import Example, data_from_examples, data_from_tasks
from lrd_jax.training.mixture import task_weights
from lrd_jax.training.settings import Phase, TrainConfig, VocabularyConfig
from tests.standin import user_error
from tests.train_toy import END_ID, model_config

CONFIG = TrainConfig(steps=40, batch_size=8, windows=(40, 64), warmup_steps=0)
PHASES = (
    Phase(fraction=0.25, weights={"facts": 1.0}, batch_size=6, windows=(8,)),
    Phase(fraction=0.75, weights={"sudoku": 1.0, "copy": 2.0}),
)


@pytest.fixture(scope="module")
def tokenizer():
    texts = vocabulary.task_texts(count=40)
    backend = vocabulary.build_tokenizer(VocabularyConfig(size=300), texts)
    return Tokenizer(backend, vocabulary.NAMED, vocabulary.CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_config(max_length=160, **vocabulary.special_ids(tokenizer.backend))


def make(model, tokenizer, phases=PHASES, **changes):
    cfg = dataclasses.replace(CONFIG, **changes)
    return data_from_tasks(cfg, phases, model, tokenizer, "a.toml")


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_batch_follows_from_seed_and_step(model, tokenizer):
    first, second = (make(model, tokenizer, pool_batches=3) for _ in range(2))
    backwards = [second.batch(step) for step in reversed(range(8, 14))]
    for step, batch in zip(range(8, 14), reversed(backwards), strict=True):
        assert same(first.batch(step), batch)
    other = make(model, tokenizer, seed=1)
    steps = [make(model, tokenizer).batch(step) for step in (3, 4)]
    assert not same(steps[0], steps[1])
    assert not same(steps[0], other.batch(3))


def test_a_batch_holds_training_problems(model, tokenizer):
    batch = make(model, tokenizer).batch(5)
    for ids, mask, response in zip(*batch[:3], strict=True):
        prompt = tokenizer.decode(np.asarray(ids)[np.asarray(mask)])
        answer = tokenizer.decode(response)
        numbers = [int(n) for n in prompt.strip("What is?=").split() if n.isdecimal()]
        assert int(answer) in (sum(numbers), numbers[0] - numbers[1])
        ends = np.asarray(response) == END_ID
        assert ends.any()
        assert ends[ends.argmax() :].all()


def test_held_out_problems_are_never_drawn(model, tokenizer):
    phases = (Phase(fraction=1.0, weights={"facts": 1.0}, windows=(8,)),)
    drawn = make(model, tokenizer, phases)
    prompts = set()
    for step in range(40):
        batch = drawn.batch(step)
        for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True):
            prompts.add(tuple(np.asarray(ids)[np.asarray(mask)].tolist()))
    test = itertools.islice(instances(TASKS["facts"], "test", 0), 300)
    held = {tuple(encode_prompt(tokenizer, model, prompt=x.prompt)) for x in test}
    assert len(prompts) > 250
    assert not prompts & held


def test_phases_follow_each_other(model, tokenizer):
    drawn = make(model, tokenizer)
    assert drawn.groups == ("facts", "lists", "sudoku")
    shapes, groups = zip(
        *(
            (b.response_ids.shape, set(np.asarray(b.group).tolist()))
            for b in map(drawn.batch, range(40))
        ),
        strict=True,
    )
    assert set(shapes[:10]) == {(6, 8)}
    assert set(shapes[10:]) == {(8, 40), (8, 64)}
    assert set.union(*groups[:10]) == {0}
    assert set.union(*groups[10:]) == {1, 2}


def test_the_mixture_is_the_weights(model, tokenizer):
    phases = (Phase(fraction=1.0, weights={"sudoku": 1.0, "copy": 3.0}),)
    drawn = make(model, tokenizer, phases, batch_size=50)
    counts = collections.Counter(
        drawn.groups[g]
        for step in range(20)
        for g in np.asarray(drawn.batch(step).group)
    )
    assert counts["lists"] / 1000 == pytest.approx(0.75, abs=0.05)


def test_a_family_is_shared_by_its_tasks_and_a_task_comes_first():
    assert task_weights({"sudoku": 2.0, "copy": 2.0}, "") == {
        "sudoku_easy": 0.25,
        "sudoku_hard": 0.25,
        "copy": 0.5,
    }
    assert task_weights({"facts": 5.0}, "") == {"facts": 1.0}
    with user_error("a.toml", "'sudoko'", "sudoku"):
        task_weights({"copy": 1.0, "sudoko": 1.0}, "a.toml")


def test_the_window_does_not_depend_on_the_answers(model, tokenizer):
    drawn = make(
        model,
        tokenizer,
        PHASES[1:]
        and (PHASES[1].__class__(fraction=1.0, weights={"copy": 1.0, "sudoku": 1.0}),),
    )
    lengths = {40: [], 64: []}
    for step in range(40):
        response = np.asarray(drawn.batch(step).response_ids)
        lengths[response.shape[1]] += (response != END_ID).sum(1).tolist()
    assert min(map(len, lengths.values())) > 100
    assert np.mean(lengths[40]) == pytest.approx(np.mean(lengths[64]), abs=2)


def test_pools_save_padding(model, tokenizer):
    phases = (Phase(fraction=1.0, weights={"facts": 1.0, "sudoku": 1.0}),)

    def width(pool):
        drawn = make(model, tokenizer, phases, pool_batches=pool)
        return np.mean([drawn.batch(s).prompt_ids.shape[1] for s in range(16)])

    assert width(8) < 0.85 * width(1)


def test_problems_that_never_fit_are_said_to(model, tokenizer):
    phases = (Phase(fraction=1.0, weights={"sudoku": 1.0}, windows=(8, 16)),)
    with user_error("sudoku", "20 tokens", "shortest window, 8"):
        make(model, tokenizer, phases)
    small = dataclasses.replace(model, max_length=45)
    with user_error("in a row do not fit", "model's context, 45"):
        make(small, tokenizer, PHASES[1:])


def test_problems_of_a_later_phase_that_never_fit_are_said_to_at_once(model, tokenizer):
    phases = (
        Phase(fraction=0.9, weights={"copy": 1.0}, windows=(64,)),
        Phase(fraction=0.1, weights={"copy": 1.0, "sudoku": 0.01}, windows=(16,)),
    )
    with user_error("sudoku", "20 tokens", "shortest window, 16"):
        make(model, tokenizer, phases)


def test_answers_of_a_chat_model_end_as_its_own(model, tokenizer):
    tuned = dataclasses.replace(model, chat=True, eos_ids=(7, 8))
    batch = make(tuned, tokenizer).batch(0)
    for row in np.asarray(batch.response_ids):
        kept = row[: np.flatnonzero(row != tuned.pad_id)[-1] + 1]
        assert list(kept[-2:]) == [8, 7]


def test_tasks_need_a_tokenizer(model):
    with user_error("no tokenizer.json"):
        make(model, None)


@pytest.mark.parametrize("pool_batches", [1, 4])
def test_each_example_of_a_file_comes_once_a_turn(pool_batches):
    examples = [Example([2 + i], [2 + i], 0) for i in range(10)]
    cfg = dataclasses.replace(
        CONFIG, batch_size=5, windows=(4,), pool_batches=pool_batches
    )
    drawn = data_from_examples(cfg, examples, model_config())
    seen = [np.asarray(drawn.batch(s).response_ids)[:, 0] for s in range(8)]
    for turn in np.array(seen).reshape(4, 10) if pool_batches == 1 else ():
        assert sorted(turn) == list(range(2, 12))
    assert collections.Counter(np.concatenate(seen)) == dict.fromkeys(range(2, 12), 4)
    assert not np.array_equal(seen[:2], seen[2:4])


def test_lengths_of_prompts_are_few():
    lengths = [data.prompt_length(n) for n in range(1, 257)]
    assert all(got >= n for n, got in enumerate(lengths, start=1))
    assert sorted(set(lengths)) == [
        8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 192, 256,
    ]  # fmt: skip
