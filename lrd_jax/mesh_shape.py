"""What `--mesh` says, read without JAX so that a mistake in it is answered at once."""

import dataclasses
import re

from lrd_jax.errors import UserError

AUTO = "auto"
FORM = "`data=4,model=2`, one of the two, or `auto`"


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices each axis of a mesh has.

    Attributes:
        data: rows of a batch are spread over these; None for as many as there are.
        model: one copy of the weights is split over these.
    """

    data: int | None = None
    model: int = 1

    def __str__(self) -> str:
        return f"data={self.data},model={self.model}"


def parse_mesh(text: str) -> MeshShape | None:
    """Reads `data=4,model=2`; either axis may be left out. None for `auto`.

    Raises:
        UserError: anything else.
    """
    if text == AUTO:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(data|model)\s*=\s*([1-9][0-9]*)\s*", part)
        if match is None or match[1] in sizes:
            raise UserError(f"`--mesh` must be {FORM}, got {text!r}.")
        sizes[match[1]] = int(match[2])
    if "model" not in sizes:
        return MeshShape(data=sizes["data"])
    return MeshShape(data=sizes.get("data"), model=sizes["model"])
