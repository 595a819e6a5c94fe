"""Flags that a test adds to those that it shares with others."""

from collections.abc import Sequence


def with_flags(shared: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`flags`, behind those pairs of `shared` whose flag is not among them."""
    pairs = zip(shared[::2], shared[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in flags for word in pair] + [*flags]
