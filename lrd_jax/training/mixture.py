"""Shares of tasks in a phase, by the names of tasks or of their families."""

from collections.abc import Mapping

from lrd_jax.errors import UserError
from lrd_jax.tasks import named


def task_weights(weights: Mapping[str, int | float], where: str) -> dict[str, float]:
    """Task -> its share; a name that is no task's is a family's.

    Raises:
        UserError: neither a task nor a family.
    """
    shares: dict[str, float] = {}
    for name, weight in weights.items():
        members = task_names(name, where)
        for member in members:
            shares[member] = shares.get(member, 0.0) + weight / len(members)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def task_names(name: str, where: str) -> list[str]:
    """The name itself if it is a task's, else those of the family's tasks.

    Raises:
        UserError: neither a task nor a family; `where` says who named it.
    """
    try:
        return [task.name for task in named(name)]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
