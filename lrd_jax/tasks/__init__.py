"""Problems to train and measure on, each with a scorer; no part needs JAX.

task = tasks.find("sort_numbers")
problem = next(tasks.instances(task, "test", seed=0))
task.score(problem, response)
"""

import difflib

from lrd_jax.errors import UserError
from lrd_jax.tasks import arithmetic, code, lists, stories, sudoku
from lrd_jax.tasks.base import SPLITS, Instance, Split, Task, instances

__all__ = ["SPLITS", "TASKS", "Instance", "Split", "Task", "find", "instances", "named"]

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
        raise _unknown(name, list(TASKS))
    return TASKS[name]


def named(name: str) -> list[Task]:
    """The task of that name, or else the tasks of the family of that name.

    Raises:
        UserError: neither a task nor a family.
    """
    if name in TASKS:
        return [TASKS[name]]
    members = [task for task in TASKS.values() if task.family == name]
    if not members:
        families = [task.family for task in TASKS.values()]
        raise _unknown(name, list(dict.fromkeys([*families, *TASKS])))
    return members


def _unknown(name: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else ", ".join(known)
    return UserError(f"no task {name!r}; {hint}")
