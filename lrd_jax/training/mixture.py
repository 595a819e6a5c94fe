"""Shares of tasks in a phase, by the names of tasks or of their families."""

from collections.abc import Mapping

from lrd_jax.errors import UserError
from lrd_jax.tasks import named


def task_weights(weights: Mapping[str, int | float], where: str) -> dict[str, float]:
    """Task -> its share; a name that is no task's is a family's.

    Raises:
        UserError: neither a task nor a family; `where` says who named it.
    """
    shares: dict[str, float] = {}
    for name, weight in weights.items():
        try:
            members = named(name)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for task in members:
            shares[task.name] = shares.get(task.name, 0.0) + weight / len(members)
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}
