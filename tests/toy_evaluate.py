"""A task that the toy model of `toy_run` answers sometimes, and the command with both.

As a program it is `lrd_jax.evaluate` with them, so that a test can kill it:

    python tests/toy_evaluate.py SECONDS_PER_ROUND [arguments of lrd_jax.evaluate]
"""

import sys
import time

from toy_run import slots_of, toy_make_decode_fn, toy_source

from lrd_jax import tasks
from lrd_jax.evaluate import main
from lrd_jax.process import leave
from lrd_jax.scheduler import Scheduler
from lrd_jax.tasks.base import one_by_one


def toy_task(name, family="toys", longest=40):
    """Prompts of many lengths; right is whatever begins with an even word."""

    def generate(rng):
        words = [f"w{rng.randrange(14, 60)}" for _ in range(rng.randrange(1, longest))]
        prompt = f"{' '.join(words)}"
        return tasks.Instance(
            prompt=prompt,
            answer="w2",
            payload={"length": len(words)},
            key=prompt,
            group=prompt,
        )

    return tasks.Task(
        name=name,
        family=family,
        generate=generate,
        extract=lambda response: response.partition(" ")[0] or None,
        grade=one_by_one(lambda payload, answer: int(answer[1:]) % 2 == 0),
        held_out=20,
    )


TOYS = {name: toy_task(name) for name in ("toy_a", "toy_b", "toy_c")} | {
    "single": toy_task("single", family="alone")
}


def run_toy(argv, make_decode_fn=toy_make_decode_fn, **source):
    """`main` with the toy model; returns its exit code."""
    return main(
        [str(word) for word in argv],
        open_source=lambda *_: toy_source(**source),
        make_slots=lambda *args: slots_of(make_decode_fn(*args)),
    )


if __name__ == "__main__":
    tasks.TASKS.update(TOYS)
    seconds, launch = float(sys.argv[1]), Scheduler._launch

    def slow_launch(*args):
        time.sleep(seconds)
        return launch(*args)

    Scheduler._launch = slow_launch
    leave(run_toy(sys.argv[2:]))
