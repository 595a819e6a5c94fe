"""A checkpoint of a gigabyte is converted in the memory of one leaf."""

import json
import subprocess
import sys
import textwrap

import pytest

# 1.1 GB in bfloat16; its largest leaf, the stacked MLP kernel, 235 MB.
SIZES = dict(
    d_model=2048,
    embedding_size=16000,
    mlp_hidden_size=8192,
    n_heads=16,
    n_kv_heads=16,
    n_layers=7,
    vocab_size=16000,
)
LARGEST_LEAF = 7 * 2048 * 8192 * 2
# The promise is 1 GB; less is asserted, as with 1 GB the whole would fit beside a leaf.
ALLOWANCE = 512 * 2**20

MAKE = """
    import json, pathlib, sys
    import ml_dtypes, numpy as np
    from safetensors.numpy import save_file
    from convert import keymap
    from lrd_jax.model import families

    folder, config = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, entry in enumerate(keymap.entries(families.from_published(config))):
        shard = {}
        for name in entry.names:
            # The exponents of numbers around one, so that all are finite.
            bits = rng.integers(0x3E00, 0x4000, entry.published_shape, np.uint16)
            shard[name] = bits.view(ml_dtypes.bfloat16)
            weight_map[name] = f"model-{number}.safetensors"
        save_file(shard, folder / f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
"""
CONVERT = """
    import re, sys
    from convert import __main__ as command
    command._set_up_process()
    import safetensors, convert.convert, convert.tokenizer
    from orbax.checkpoint import v1

    def memory(field):
        with open("/proc/self/status") as status:
            return 1024 * int(re.search(field + r":\\s+(\\d+)", status.read())[1])

    before = memory("VmRSS")
    assert command.main(["--src", sys.argv[1], "--dst", sys.argv[2]]) == 0
    print(memory("VmHWM") - before)
"""


def run(script, *args):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_one_leaf_and_a_constant(tmp_path, tiny_config):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    try:
        run(MAKE, src, json.dumps(tiny_config | SIZES))
        peak = int(run(CONVERT, src, dst).splitlines()[-1])
    finally:
        # Pytest keeps the directories of the last runs.
        for file in tmp_path.rglob("*"):
            if file.is_file():
                file.unlink()
    assert peak <= LARGEST_LEAF + ALLOWANCE, f"{peak / 2**20:.0f} MiB"


@pytest.fixture
def tiny_config(request):
    file = request.path.parent / "golden" / "llada_tiny" / "config.json"
    return json.loads(file.read_text())
