"""A sentence -> a one-line Python function, judged by what the function does.

Functions are put together from steps, so there are tens of thousands. Two that give the
same results on all the inputs count as one when the splits are made, however they are
written: a function of the test split has not been trained under another name.
"""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from lrd_jax.tasks import sandbox
from lrd_jax.tasks.base import Instance, Payload, Task, until_end
from lrd_jax.tasks.code_steps import CONDITIONS, CONSTANTS, INPUTS, STEPS, Bind, Step
from lrd_jax.tasks.draw import chance, pick

LONGEST = 60  # Characters of an answer.

_NOUNS = {
    "number": "a number",
    "text": "a text",
    "numbers": "a list of numbers",
    "words": "a list of words",
}
_FRAMES = (
    "Write a Python function f(x) for {noun} x: {what}.",
    "Python function f of {noun} x: {what}.",
)
_CHAIN_LENGTHS = (1, 2, 2, 2)  # There are few with one step.
_PREFIX = "def f(x): return "
# A line that is not indented, with the indented and empty ones below it.
_BLOCK = re.compile(r"^\S.*(?:\n(?:[ \t].*)?$)*", re.MULTILINE)
_HELPER = re.compile(r"import\s+\w|from\s+[\w.]+\s+import\s|def\s")


@dataclasses.dataclass(frozen=True)
class Value:
    """An expression and what it is known to be.

    Attributes:
        kind: number, text, numbers, words or truth.
        text: the Python expression.
        binds: how tightly it binds.
        parts: of a comprehension that can still take a step in, else None: what each
            item becomes, how tightly that binds, the list, the condition or "".
    """

    kind: str
    text: str
    binds: Bind = Bind.ATOM
    parts: tuple[str, Bind, str, str] | None = None


def _put(code: str, inner: str, binds: Bind, needs: Bind) -> str:
    return code.replace("{x}", inner if binds >= needs else f"({inner})")


def apply(step: Step, constants: dict[str, Any], value: Value) -> Value:
    """The expression for a step done to a value.

    A condition and a change of each item share one comprehension where they can.
    """
    # The hole stays for `_put`: the value may have braces of its own.
    code = step.code.format(x="{x}", i="{x}", **constants)
    if "{i}" not in step.code:
        text = _put(code, value.text, value.binds, step.needs)
        return Value(step.gives, text, step.binds)
    item = "n" if value.kind == "numbers" else "w"
    become, binds, source, condition = value.parts or (item, Bind.ATOM, value.text, "")
    gives = value.kind if step.gives == "keep" else step.gives
    if step.gives == "keep":
        if become != item:  # The condition is about the items as changed.
            become, binds, source, condition = item, Bind.ATOM, value.text, ""
        condition += " and " if condition else " if "
        condition += _put(code, item, Bind.ATOM, step.needs)
    else:
        become, binds = _put(code, become, binds, step.needs), step.binds
    text = f"[{become} for {item} in {source}{condition}]"
    # When words become numbers, the items have another name from there on.
    parts = (become, binds, source, condition) if gives == value.kind else None
    return Value(gives, text, Bind.ATOM, parts)


def _draw_constants(rng: random.Random, code: str) -> dict[str, Any]:
    names = re.findall(r"\{(\w)(?:!r)?\}", code)
    return {name: pick(rng, CONSTANTS[name]) for name in names if name in CONSTANTS}


def _draw_step(rng: random.Random, value: Value) -> tuple[str, Value]:
    step = pick(rng, STEPS[value.kind])
    constants = _draw_constants(rng, step.code)
    phrase = pick(rng, step.says.split("|")).format(**constants)
    return phrase, apply(step, constants, value)


def _draw_chain(rng: random.Random, kind: str) -> tuple[str, list[Value]]:
    """One or two steps: the phrase, and the value after each step."""
    says: list[str] = []
    values = [Value(kind, "x")]
    num_steps = pick(rng, _CHAIN_LENGTHS)
    while len(says) < num_steps:
        phrase, value = _draw_step(rng, values[-1])
        if value.kind == "truth" and len(says) < num_steps - 1:
            continue  # Nothing can be done with it.
        says.append(phrase)
        values.append(value)
    joint = pick(rng, (", then ", " and then "))
    return joint.join(says), values


def _draw_choice(rng: random.Random, kind: str) -> tuple[str, list[Value]]:
    """Two steps to choose from: the phrase, and the parts of the value and itself."""
    x = Value(kind, "x")
    phrase, condition = pick(rng, CONDITIONS[kind])
    drawn = _draw_constants(rng, condition)
    says, yes = _draw_step(rng, x)
    while yes.kind == "truth":  # "If it is even, tell if it is odd" makes no sense.
        says, yes = _draw_step(rng, x)
    says_no, no = ("leave it as it is", x)
    if yes.kind != kind or chance(rng, 0.75):
        says_no, no = _draw_step(rng, x)
        while no.kind != yes.kind:
            says_no, no = _draw_step(rng, x)
    test = condition.format(**drawn)
    whole = Value(yes.kind, f"{yes.text} if {test} else {no.text}", Bind.CHOICE)
    otherwise = pick(rng, ("otherwise", "else"))
    what = f"if {phrase.format(**drawn)}, {says}, {otherwise} {says_no}"
    return what, [x, yes, no, whole]


@functools.lru_cache(maxsize=4096)
def _results(expression: str, kind: str) -> str:
    """What the expression gives for each input, as JSON; null where it raises."""
    function = eval(f"lambda x: {expression}")  # Made here, of the steps alone.
    found = []
    for x in INPUTS[kind]:
        try:
            found.append(function(x))
        except (ValueError, IndexError):
            found.append(None)
    return json.dumps(found)


def _function(
    rng: random.Random,
    *,
    kinds: Sequence[str],
    draw: Callable[[random.Random, str], tuple[str, list[Value]]],
) -> Instance:
    """Draws until the function is short and its last part is not in vain."""
    while True:
        kind = pick(rng, kinds)
        what, values = draw(rng, kind)
        answer = _PREFIX + values[-1].text
        if len(answer) > LONGEST:
            continue
        *parts, whole = (_results(value.text, kind) for value in values)
        results = json.loads(whole)
        enough = 2 if values[-1].kind == "truth" else 4
        if whole not in parts and len(set(map(repr, results))) >= enough:
            break
    pairs = zip(INPUTS[kind], results, strict=True)
    return Instance(
        prompt=pick(rng, _FRAMES).format(noun=_NOUNS[kind], what=what),
        answer=answer,
        payload={"cases": [[x, result] for x, result in pairs if result is not None]},
        key=f"code: {kind}: {values[-1].text}",
        group=f"code: {kind}: {whole}",
    )


def extract(response: str) -> str | None:
    """The program: `f` as a def or a lambda, and the imports and functions above it.

    What else stands above or below it, a text or a fence of Markdown, is left out.
    """
    needed: list[str] = []
    for block in _BLOCK.findall(until_end(response)):
        if re.match(r"lambda\b", block):
            block = "f = " + block
        if re.match(r"f\s*=", block):
            return "\n".join([*needed, block.partition("\n")[0]])
        if re.match(r"def\s+f\b", block):
            return "\n".join([*needed, block.rstrip()])
        if _HELPER.match(block):
            needed.append(block.rstrip())
    return None


def grade(payloads: Sequence[Payload], answers: Sequence[str]) -> list[bool]:
    """Runs each answer on its hidden inputs, out of reach of this process."""
    programs = [
        sandbox.Program(
            source=answer,
            calls=[
                sandbox.Call("f", [x], expected) for x, expected in payload["cases"]
            ],
        )
        for payload, answer in zip(payloads, answers, strict=True)
    ]
    return [o.verdict is sandbox.Verdict.PASSED for o in sandbox.run(programs)]


def _task(
    name: str,
    kinds: Sequence[str],
    draw: Callable[[random.Random, str], tuple[str, list[Value]]] = _draw_chain,
) -> Task:
    return Task(
        name=name,
        family="code",
        generate=functools.partial(_function, kinds=kinds, draw=draw),
        extract=extract,
        grade=grade,
        held_out=10,  # With 5 %, too few functions of lists of words to test on.
    )


TASKS = (
    _task("code_number", ("number",)),
    _task("code_text", ("text",)),
    _task("code_numbers", ("numbers",)),
    _task("code_words", ("words",)),
    _task("code_if", tuple(CONDITIONS), _draw_choice),
)
