"""What accelerators can do at most, by their vendors' pages; nothing is measured."""

import dataclasses

GIB = 2**30
TPU_DOCS = "https://cloud.google.com/tpu/docs"
NVIDIA = "https://www.nvidia.com/en-us/data-center"


@dataclasses.dataclass(frozen=True)
class Device:
    """One chip or GPU.

    Attributes:
        kind: "tpu" or "gpu".
        memory: bytes.
        flops: bfloat16 FLOP/s of its matrix units, without sparsity.
        bandwidth: bytes/s of its memory.
        link: bytes/s that it sends to its neighbours, one direction, all links.
        source: page with these figures.
    """

    kind: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    source: str


# The pages give links in both directions together: halved here. NVIDIA gives H100's and
# H200's FLOP/s with sparsity: halved, too; its GB are 10^9.
DEVICES = {
    "v5e": Device("tpu", 16 * GIB, 197e12, 819e9, 200e9, f"{TPU_DOCS}/v5e"),
    "v5p": Device("tpu", 95 * GIB, 459e12, 2765e9, 600e9, f"{TPU_DOCS}/v5p"),
    "v6e": Device("tpu", 32 * GIB, 918e12, 1600e9, 400e9, f"{TPU_DOCS}/v6e"),
    "a100": Device("gpu", 80 * 10**9, 312e12, 2039e9, 300e9, f"{NVIDIA}/a100/"),
    "h100": Device("gpu", 80 * 10**9, 989.5e12, 3350e9, 450e9, f"{NVIDIA}/h100/"),
    "h200": Device("gpu", 141 * 10**9, 989.5e12, 4800e9, 450e9, f"{NVIDIA}/h200/"),
}
# What a decode may take of it: the rest is the runtime's. JAX reserves three quarters
# of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
USABLE = 0.92
