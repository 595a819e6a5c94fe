"""What is particular to single families of tasks."""

import collections
import functools
import itertools
import json
import random
import re

import pytest

from lrd_jax import tasks
from lrd_jax.tasks import code, stories, sudoku
from lrd_jax.tasks.base import Instance
from lrd_jax.tasks.code_steps import CONDITIONS, CONSTANTS, INPUTS, STEPS, Bind
from lrd_jax.tasks.draw import pick


@functools.cache
def drawn(name: str, count: int) -> list[Instance]:
    return list(itertools.islice(tasks.instances(tasks.find(name), "train", 5), count))


def example(**fields: object) -> Instance:
    return Instance(prompt="", answer="", key="", group="", payload=dict(fields))


# Lists


def test_lists_are_read_leniently_and_words_exactly():
    task, problem = tasks.find("sort_numbers"), example(answer="3, 15, 20")
    for response in ("3, 15, 20", "3 15 20", "[3,15,20]", "3, 15, 20\n1, 2"):
        assert task.score(problem, response)
    for response in ("3, 20, 15", "3, 15", "3, 15, 20, 20", "31520", "3, 15, 2 0"):
        assert not task.score(problem, response)
    assert not tasks.find("copy").score(example(answer="a, b"), "a b")


def test_filters_rarely_leave_nothing():
    problems = drawn("filter_numbers", 1000) + drawn("filter_words", 1000)
    assert 0 < sum(x.answer == "none" for x in problems) < 100


@pytest.mark.parametrize(
    "name", ["sort_numbers", "sort_words", "filter_numbers", "filter_words", "lookup"]
)
def test_no_item_to_sort_or_filter_stands_there_twice(name):
    for problem in drawn(name, 200):
        items = problem.prompt.rpartition(": ")[2].split(", ")
        assert len({*items}) == len(items) >= 3


def test_the_same_items_are_never_filtered_in_two_splits():
    for name in ("filter_numbers", "filter_words", "lookup"):
        problem = drawn(name, 1)[0]
        items = problem.prompt.rpartition(": ")[2].split(", ")
        assert problem.group == f"{name}: {', '.join(sorted(items))}"


def test_the_word_looked_up_is_the_only_one_with_its_letter():
    for problem in drawn("lookup", 300):
        rule, _, items = problem.prompt.partition(": ")
        words, letter = items.split(", "), rule[-1]
        place = 0 if " starts with " in rule else -1
        assert [w for w in words if w[place] == letter] == [problem.answer]


# Sudoku


def test_all_grids_are_there():
    assert len(set(sudoku.grids())) == 288


def test_grids_are_split_whole():
    found: dict[str, set[str]] = {}
    rng = random.Random(2)
    for name in ("sudoku_easy", "sudoku_hard"):
        task = tasks.find(name)
        for _ in range(1500):
            problem = task.generate(rng)
            found.setdefault(problem.answer, set()).add(task.split_of(problem))
    # Each grid has one split, the same for both tasks.
    (splits,) = zip(*found.values(), strict=True)
    sizes = collections.Counter(splits)
    assert sizes == {"train": 243, "validation": 24, "test": 21}


@pytest.mark.parametrize(
    ("name", "fewest", "most"), [("sudoku_easy", 3, 8), ("sudoku_hard", 9, 12)]
)
def test_puzzles_have_one_solution(name, fewest, most):
    problems = drawn(name, 300)
    puzzles = [x.payload["puzzle"] for x in problems]
    assert {sudoku.count_solutions(puzzle) for puzzle in puzzles} == {1}
    assert {puzzle.count(".") for puzzle in puzzles} == {*range(fewest, most + 1)}


def test_solutions_are_judged_by_rules_and_givens():
    task, problem = tasks.find("sudoku_easy"), example(puzzle="1234" + "." * 12)
    assert sudoku.count_solutions(problem.payload["puzzle"]) > 1
    assert task.score(problem, "1234\n3412\n2143\n4321")
    assert task.score(problem, "1234\n3412\n4321\n2143")
    assert task.score(problem, "1 2 3 4\n3 4 1 2\n\n2 1 4 3\n4 3 2 1\nthere")
    assert not task.score(problem, "1234\n3412\n2143\n4312")  # A column.
    assert not task.score(problem, "1234\n2341\n3412\n4123")  # A box.
    assert not task.score(problem, "1243\n3412\n2134\n4321")  # A given.
    assert not task.score(problem, "1234\n3412\n2143")
    assert not task.score(problem, "1234 3412 2143 4321")


# Arithmetic


@pytest.mark.parametrize("name", ["facts", "products"])
def test_facts_are_true(name):
    for x in drawn(name, 300):
        fact = re.search(r"(-?\d+) ([-+*]) (\d+)", x.prompt)
        assert fact is not None
        assert str(eval(fact[0])) == x.answer


@pytest.mark.parametrize("name", ["expressions", "word_problems"])
def test_steps_are_true_and_small(name):
    for x in drawn(name, 500):
        *steps, last = x.answer.split("\n")
        assert 2 <= len(steps) <= 3
        assert all(0 <= int(n) <= 12 for n in re.findall(r"-?\d+", x.answer))
        for step in steps:
            left, value = step.split(" = ")
            assert eval(left) == int(value)
            a, op, b = left.split(" ")
            assert op != "*" or min(int(a), int(b)) < 10
        assert last == f"#### {value}"


def test_operations_are_the_single_steps_of_expressions():
    operations = drawn("operations", 300)
    for x in operations:
        lines = x.answer.split("\n")
        assert 3 <= len(lines) <= 4
        assert x.prompt.endswith(": " + ", ".join(y.split(" = ")[0] for y in lines))
    of_operations = {line for x in operations for line in x.answer.split("\n")}
    of_expressions = {
        line for x in drawn("expressions", 5000) for line in x.answer.split("\n")[:-1]
    }
    assert of_operations <= of_expressions
    operands = [line.split(" = ")[0].split(" ") for line in of_operations]
    assert {op for _, op, _ in operands} == set("+-*")
    # Leaves begin at 1: a 0 comes from an earlier step.
    assert "0" in {n for a, _, b in operands for n in (a, b)}
    for line in of_expressions:
        left, value = line.split(" = ")
        assert eval(left) == int(value)


def test_operations_are_read_line_by_line():
    task, problem = tasks.find("operations"), example(answer="1 + 2 = 3\n4 - 4 = 0")
    assert task.score(problem, "1 + 2 = 3\n4 - 4 = 0\n#### 0")
    for response in ("1 + 2 = 3", "4 - 4 = 0\n1 + 2 = 3", "1 + 2 = 3\n4 - 4 = 1"):
        assert not task.score(problem, response)


def test_equations_are_true_and_not_those_of_the_prompt():
    for x in drawn("equations", 300):
        lines = x.answer.split("\n")
        assert len(lines) == x.payload["count"] == int(x.prompt.split(" ")[1])
        examples = re.split(" like | such as ", x.prompt)[1].split(", ")
        assert len({*lines, *examples}) == len(lines) + 2
        for line in (*lines, *examples):
            left, value = line.split(" = ")
            assert eval(left) == int(value)


def test_any_true_equations_do():
    task, problem = tasks.find("equations"), example(count=2)
    for response in ("1 + 2 = 3\n4 * 4 = 16", "30 - 1 = 29\n1 + 1 = 2\n#### 2"):
        assert task.score(problem, response)
    for response in (
        "1 + 2 = 3",
        "1 + 2 = 3\n1 + 2 = 3",
        "1 + 2 = 3\n4 * 4 = 8",
        "3 = 3\n4 = 4",
        "1 + 2 = 3\n4 * 4 = 16\n1 - 1 = 0",
    ):
        assert not task.score(problem, response)


def test_pairs_are_expressions_whose_last_step_takes_the_results_of_two():
    task, expressions = tasks.find("pairs"), tasks.find("expressions")
    for x in drawn("pairs", 300):
        first, second, third, _ = x.answer.split("\n")
        results = [line.split(" = ")[1] for line in (first, second)]
        left, value = third.split(" = ")
        assert left.split(" ")[::2] == results
        assert eval(x.key.removeprefix("expression: ")) == int(value)
        assert task.score(x, x.answer)
        # What is held out of the one is held out of the other.
        assert task.split_of(x) == expressions.split_of(x)


def test_expressions_have_the_value_python_gives_them():
    for x in drawn("expressions", 500):
        expression = x.key.removeprefix("expression: ")
        assert expression in x.prompt
        assert eval(expression) == x.payload["answer"]
        assert all(1 <= int(n) <= 12 for n in re.findall(r"\d+", expression))


def test_every_story_is_told_with_all_its_numbers():
    problems = drawn("word_problems", 1500)
    assert len({x.group.split()[1] for x in problems}) == len(stories.TEMPLATES)
    for x in problems:
        told = re.findall(r"\d+", x.prompt)
        assert len(told) == 3
        first_step = x.answer.split(" = ")[0]
        assert set(re.findall(r"\d+", first_step)) <= set(told)
        assert "{" not in x.prompt


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("1 + 1 = 2\n#### 2", "2"),
        ("####-7", "-7"),
        ("#### 1,234 apples", "1234"),
        ("#### 2\n#### 3", "2"),
        ("#### 2.50", "2.50"),
        ("#### 2<|endoftext|>#### 3", "2"),
        ("2", None),
        ("#### two", None),
        ("<|endoftext|>#### 2", None),
    ],
)
def test_final_numbers(response, number):
    assert tasks.find("expressions").extract(response) == number


# Code


def test_functions_are_many():
    generate, rng = tasks.find("code_numbers").generate, random.Random(0)
    assert len({generate(rng).group for _ in range(1000)}) > 400


def plainly(step, constants, text, kind):
    """The same as `code.apply`, with parentheses around everything."""
    code_text = step.code.format(x=f"({text})", i="(item)", **constants)
    if "{i}" not in step.code:
        return f"({code_text})"
    if step.gives == "keep":
        return f"[item for item in ({text}) if ({code_text})]"
    return f"[({code_text}) for item in ({text})]"


def results(expression, kind):
    function, found = eval(f"lambda x: {expression}"), []
    for x in INPUTS[kind]:
        try:
            found.append(function(x))
        except (ValueError, IndexError) as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("kind", list(STEPS))
def test_chains_mean_the_same_with_all_parentheses(kind):
    rng = random.Random(1)
    for _ in range(300):
        value, plain = code.Value(kind, "x"), "x"
        for _ in range(3):
            if value.kind not in STEPS:
                break
            step = pick(rng, STEPS[value.kind])
            constants = {name: pick(rng, c) for name, c in CONSTANTS.items()}
            plain = plainly(step, constants, plain, value.kind)
            value = code.apply(step, constants, value)
        assert results(value.text, kind) == results(plain, kind), value.text


def test_letters_are_quoted_in_the_prompt_as_in_the_code():
    quoted = 0
    for name in ("code_text", "code_words", "code_if"):
        for problem in drawn(name, 100):
            letters = re.findall(r"'[a-z]'", problem.answer)
            assert all(letter in problem.prompt for letter in letters)
            quoted += len(letters)
    assert quoted > 50


def test_steps_have_all_constants_that_they_say():
    names = re.compile(r"\{(\w)")
    for step in itertools.chain(*STEPS.values()):
        in_code = [n for n in names.findall(step.code) if n in CONSTANTS]
        for phrase in step.says.split("|"):
            assert sorted(names.findall(phrase)) == sorted(in_code)
    for phrase, condition in itertools.chain(*CONDITIONS.values()):
        assert names.findall(phrase) == names.findall(condition)
    assert {step.binds for step in STEPS["number"]} == set(Bind) - {Bind.CHOICE}


def test_cases_are_what_the_answer_does():
    for x in drawn("code_if", 50) + drawn("code_words", 50):
        space: dict = {}
        exec(x.answer, space)
        assert len(x.payload["cases"]) >= 15
        for argument, expected in x.payload["cases"]:
            got = space["f"](json.loads(json.dumps(argument)))
            assert json.dumps(got) == json.dumps(expected)


def test_functions_are_judged_by_what_they_do():
    task = tasks.find("code_number")
    problem = example(cases=[[x, x * 2 + 1] for x in range(-3, 9)])
    responses = {
        "def f(x): return x * 2 + 1": True,
        "def f(x): return 1 + x + x": True,
        "lambda x: 2 * x + 1": True,
        "f = lambda x: 2 * x + 1": True,
        "```python\ndef f(x):\n    y = 2 * x\n\n    return y + 1\n```\nDone.": True,
        "import math\ndef f(x): return math.floor(x * 2 + 1)": True,
        "from math import floor\nf = lambda x: floor(x * 2 + 1)": True,
        "Here:\ndef g(x):\n    return 2 * x\n\ndef f(x):\n    return g(x) + 1": True,
        "def f(x): return 2 * x + 1\n\nprint(f(x))\ndef f(x): return 0": True,
        "def f(x): return x * 2": False,
        "def f(x): return x * 2 + 1 if x < 8 else 0": False,
        "def f(x): return float(x * 2 + 1)": False,
        "def g(x): return x * 2 + 1": False,
        "def f(x): print(x * 2 + 1)": False,
        "def f(x) return x * 2 + 1": False,
        "x * 2 + 1": False,
    }
    scores = task.score_all([problem] * len(responses), list(responses))
    assert dict(zip(responses, scores, strict=True)) == responses
