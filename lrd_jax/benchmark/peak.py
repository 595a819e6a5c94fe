"""The float32 matrix products that each library reaches: what a forward could take."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lrd_jax.benchmark.clock import Seconds, spread
from lrd_jax.benchmark.parts import compiled

SIZE = 1024
# Several at a time, so that starting one does not count.
PRODUCTS = 4


def jax_peak() -> Callable[[], Any]:
    """Products of two square float32 matrices, one after the other."""
    left = jax.random.normal(jax.random.key(0), (SIZE, SIZE)) / SIZE**0.5

    def products(left: Any) -> Any:
        right = left
        for _ in range(PRODUCTS):
            right = jnp.dot(left, right, precision="highest")
        return right

    return compiled(products, left)


def torch_peak() -> Callable[[], Any]:
    """The same in PyTorch."""
    import torch

    left = torch.randn(SIZE, SIZE) / SIZE**0.5

    def products() -> Any:
        right = left
        for _ in range(PRODUCTS):
            right = left @ right
        return right

    return products


def gflops(seconds: Seconds, name: str) -> dict[str, float]:
    """10^9 operations a second, of each round."""
    operations = PRODUCTS * 2 * SIZE**3
    return spread([operations / one / 1e9 for one in seconds[name]])
