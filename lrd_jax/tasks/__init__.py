"""Problems to train and measure on, each with a scorer; no part needs JAX.

task = tasks.find("sort_numbers")
problem = next(tasks.instances(task, "test", seed=0))
task.score(problem, response)
"""

import difflib

from lrd_jax.errors import UserError
from lrd_jax.tasks import arithmetic, code, lists, stories, sudoku
from lrd_jax.tasks.base import SPLITS, Instance, Split, Task, instances

__all__ = ["SPLITS", "TASKS", "Instance", "Split", "Task", "find", "instances"]

TASKS: dict[str, Task] = {
    task.name: task
    for module in (lists, code, sudoku, arithmetic, stories)
    for task in module.TASKS
}


def find(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: no such task.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else ", ".join(TASKS)
        raise UserError(f"no task {name!r}; {hint}")
    return TASKS[name]
