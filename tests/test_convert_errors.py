"""Every mistake: exit code 2, one clear line, and nothing left behind."""

import _thread
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from lrd_jax import checkpoint
from lrd_jax.errors import UserError
from lrd_jax.staging import staged

GOLDEN = pathlib.Path(__file__).parent / "golden"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WTE = "model.transformer.wte.weight"  # In the first shard.
NORM = "model.transformer.blocks.1.ff_norm.weight"


@pytest.fixture
def src(tmp_path):
    """A LLaDA that a test may damage."""
    return pathlib.Path(shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "src"))


@pytest.fixture
def refuse(tmp_path, capsys):
    """Runs the converter, which must fail and leave everything as it was."""

    def run(*flags, src=tmp_path / "src", dst=tmp_path / "dst"):
        before = listing(tmp_path)
        capsys.readouterr()
        code = main(["--src", str(src), "--dst", str(dst), *flags])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert listing(tmp_path) == before
        return err.removeprefix("error: ").rstrip("\n")

    return run


def listing(folder):
    """All files below a folder and when they were last written."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def merged(src, change):
    """Makes `src` one file, after `change` had its way with the tensors."""
    tensors = {}
    for shard in SHARDS:
        tensors |= load_file(src / shard)
        (src / shard).unlink()
    (src / INDEX).unlink()
    change(tensors)
    save_file(tensors, src / "model.safetensors")


def edit_json(file, **changes):
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def weight_map(src):
    return json.loads((src / INDEX).read_text())["weight_map"]


def test_everything_wrong_with_the_tensors_is_listed_at_once(src, refuse):
    def change(tensors):
        del tensors[WTE], tensors[NORM]
        tensors["model.transformer.wpe.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.transformer.ff_out.weight"] = np.zeros((64, 384), np.float32)
        tensors["model.transformer.ln_f.weight"] = np.zeros(64, np.int8)
        tensors["model.transformer.blocks.0.q_proj.weight"] = np.zeros(
            (64, 64), ml_dtypes.float8_e4m3fn
        )

    merged(src, change)
    assert refuse() == (
        "model.transformer.blocks.0.q_proj.weight has dtype F8_E4M3, "
        "supported: BF16, F16, F32; "
        f"{NORM} is missing; "
        "model.transformer.ff_out.weight is [64, 384], expected [384, 64]; "
        "model.transformer.ln_f.weight has dtype I8, supported: BF16, F16, F32; "
        "model.transformer.wpe.weight is unexpected; "
        f"{WTE} is missing."
    )


def test_a_tensor_in_two_shards(src, refuse):
    second = load_file(src / SHARDS[1]) | {WTE: np.zeros((384, 64), np.float32)}
    save_file(second, src / SHARDS[1])
    assert f"{WTE} is in both {SHARDS[0]} and {SHARDS[1]}" in refuse()


def test_a_tensor_that_its_shard_lacks(src, refuse):
    first = load_file(src / SHARDS[0])
    del first[WTE]
    save_file(first, src / SHARDS[0])
    message = refuse()
    assert f"{WTE} is missing" in message
    assert f"{WTE} is not in {SHARDS[0]} as the index says" in message


def test_an_absent_shard(src, refuse):
    (src / SHARDS[1]).unlink()
    message = refuse()
    assert f"shard {SHARDS[1]} of the index is absent" in message
    assert message.count("is missing") == sum(
        shard == SHARDS[1] for shard in weight_map(src).values()
    )


def test_an_unsafe_shard(src, refuse):
    edit_json(src / INDEX, weight_map=weight_map(src) | {WTE: "../x.safetensors"})
    assert "unsafe or unknown kind of shard: '../x.safetensors'" in refuse()


@pytest.mark.parametrize("keep", [7, 1000, -4])
def test_a_truncated_shard(src, refuse, keep):
    data = (src / SHARDS[0]).read_bytes()
    (src / SHARDS[0]).write_bytes(data[:keep])
    assert f"{SHARDS[0]}: truncated or corrupt" in refuse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "unknown architecture: model_type is 'gpt2'"),
        ({"alibi": True}, "alibi = True (only False is supported)"),
        ({"d_model": "64"}, "d_model"),
        ({"n_heads": 0}, "heads"),
        ({"n_layers": None}, "n_layers"),
        ({"mask_token_id": 384}, "mask_id"),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported(src, refuse, changes, message):
    edit_json(src / "config.json", **changes)
    assert message in refuse()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff", "[" * 3000, "1" * 5000])
def test_a_malformed_config(src, refuse, content):
    (src / "config.json").write_bytes(content.encode("latin1"))
    assert "config.json: " in refuse()


def test_a_directory_that_is_no_checkpoint(src, refuse):
    (src / "config.json").unlink()
    assert "is not a Hugging Face checkpoint: no config.json" in refuse()


def test_no_such_source(tmp_path, refuse):
    missing = tmp_path / "a" / "b" / "c"
    assert refuse(src=missing) == f"no such directory: {missing}"


def test_a_hub_id_gets_the_download_command(tmp_path, refuse):
    assert refuse(src="GSAI-ML/LLaDA-8B-Base") == (
        "no such directory: GSAI-ML/LLaDA-8B-Base; if it is a model of the Hugging "
        'Face hub: hf download GSAI-ML/LLaDA-8B-Base --include "*.json" --include '
        '"*.safetensors" --include "*.txt" --include "*.jinja" --local-dir '
        "LLaDA-8B-Base && python -m "
        f"convert --src LLaDA-8B-Base --dst {tmp_path / 'dst'}"
    )


def test_the_download_command_keeps_the_flags(refuse):
    message = refuse("--quantize", "int8", "--overwrite", src="a/b")
    assert message.endswith(" --quantize int8 --overwrite")


@pytest.mark.parametrize("dst", ["src", "src/dst", "src/../src/dst", "."])
def test_source_and_destination_must_be_apart(src, refuse, tmp_path, dst):
    assert "must be apart" in refuse("--overwrite", dst=tmp_path / dst)


def test_the_destination_exists(src, refuse, tmp_path):
    assert main(["--src", str(src), "--dst", str(tmp_path / "dst")]) == 0
    assert refuse() == f"{tmp_path / 'dst'} exists; give --overwrite to replace it."


def test_overwriting_replaces_only_when_the_new_one_is_complete(src, refuse, tmp_path):
    flags = ["--src", str(src), "--dst", str(tmp_path / "dst"), "--overwrite"]
    assert main(flags) == 0
    old = checkpoint.read_fingerprint(tmp_path / "dst")
    data = (src / SHARDS[1]).read_bytes()
    (src / SHARDS[1]).write_bytes(data[:-1])
    refuse("--overwrite")
    assert checkpoint.read_fingerprint(tmp_path / "dst") == old
    (src / SHARDS[1]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(flags) == 0
    assert checkpoint.read_fingerprint(tmp_path / "dst") != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("to", ["lrd", "hf"])
def test_only_what_this_program_made_is_overwritten(src, refuse, tmp_path, to):
    assert main(["--src", str(src), "--dst", str(tmp_path / "ours")]) == 0
    download = shutil.copytree(src, tmp_path / "download")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("years of work")
    source = {"lrd": src, "hf": tmp_path / "ours"}[to]
    for precious in (download, notes, notes / "thesis.tex"):
        message = refuse("--to", to, "--overwrite", src=source, dst=precious)
        assert "was not made by this program" in message


@pytest.mark.parametrize("name", ["old", "new"])
def test_a_destination_of_any_name_is_overwritten(src, tmp_path, name):
    flags = ["--src", str(src), "--dst", str(tmp_path / name), "--overwrite"]
    assert main(flags) == main(flags) == 0


def test_an_interrupt_between_the_two_renames(tmp_path, monkeypatch):
    """The old one is out of the way, the new one not yet in its place."""
    rename, done = os.rename, []

    def interrupted(*paths):
        rename(*paths)
        done.append(paths)
        if len(done) == 1:
            raise KeyboardInterrupt

    (dst := tmp_path / "dst").mkdir()
    (dst / "old").write_text("")
    monkeypatch.setattr(os, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        staged(dst, overwrite=True, replaceable=lambda path: True) as folder,
    ):
        (folder / "new").write_text("")
    assert listing(tmp_path).keys() == {dst, dst / "old"}


def test_what_comes_to_the_destination_meanwhile_stays(tmp_path):
    dst = tmp_path / "dst"

    def body():
        with staged(dst, overwrite=False, replaceable=lambda path: True):
            dst.mkdir()
            (dst / "thesis.tex").write_text("years of work")

    with pytest.raises(UserError, match="give --overwrite to replace it"):
        body()
    assert listing(tmp_path).keys() == {dst, dst / "thesis.tex"}


def test_an_export_is_overwritten(src, refuse, tmp_path):
    ours, hf = tmp_path / "ours", tmp_path / "hf"
    assert main(["--src", str(src), "--dst", str(ours)]) == 0
    back = ["--src", str(ours), "--dst", str(hf), "--to", "hf"]
    assert main(back) == 0
    assert "give --overwrite" in refuse("--to", "hf", src=ours, dst=hf)
    assert main([*back, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert load_file(hf / "model-00001-of-00001.safetensors")[WTE].dtype.itemsize == 2


def test_the_way_back_needs_one_of_our_checkpoints(src, refuse):
    message = refuse("--to", "hf")
    assert message.endswith(f"python -m convert --src {src} --dst {src}-lrd")


def test_the_way_back_has_no_variant(src, refuse):
    assert "--variant" in refuse("--to", "hf", "--variant", "base")


def test_damaged_weights_on_the_way_back(src, refuse, tmp_path):
    ours = tmp_path / "ours"
    assert main(["--src", str(src), "--dst", str(ours)]) == 0
    largest = max((ours / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert "its weights are not what was written" in refuse("--to", "hf", src=ours)
    largest.write_bytes(data[:-1])
    name = str(largest.relative_to(ours))
    assert f"absent or truncated: {name}" in refuse("--to", "hf", src=ours)


def test_a_destination_that_cannot_be_written(src, refuse, tmp_path):
    (tmp_path / "file").write_text("")
    message = refuse(dst=tmp_path / "file" / "dst")
    assert "file/dst: cannot be written: " in message


def test_a_full_disk_is_noticed_before_it_is_full(src, refuse, monkeypatch):
    usage = shutil.disk_usage(src)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "the disk has 1,000 bytes free, 763,648 are needed" in refuse()


def test_a_disk_that_fails_while_writing(src, refuse, tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as orbax

    def fail(*args):
        raise OSError(28, "No space left on device")

    def fail_inside(*args):
        raise ValueError("RESOURCE_EXHAUSTED\nin a stack of files")

    monkeypatch.setattr(checkpoint.model_file, "write", fail)
    want = f"{tmp_path / 'dst'}: cannot be written: No space left on device"
    assert refuse() == want
    # TensorStore's errors are all of this kind.
    monkeypatch.setattr(orbax.partial, "save", fail_inside)
    assert refuse() == f"{tmp_path / 'dst'}: cannot be written: RESOURCE_EXHAUSTED"


def test_an_interrupt_leaves_nothing(src, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.model_file, "write", interrupt)
    before = listing(tmp_path)
    dst = tmp_path / "new" / "dst"
    assert main(["--src", str(src), "--dst", str(dst)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written.\n"
    assert listing(tmp_path) == before


def test_an_interrupt_waits_for_what_writes_in_the_background(
    src, tmp_path, monkeypatch
):
    from orbax.checkpoint import v1 as orbax

    def slow(path, tree):
        _thread.interrupt_main()
        time.sleep(0.3)
        path.mkdir(parents=True)

    monkeypatch.setattr(orbax.partial, "save", slow)
    before = listing(tmp_path)
    assert main(["--src", str(src), "--dst", str(tmp_path / "dst")]) == 130
    assert listing(tmp_path) == before


def test_an_unknown_flag_is_an_error(capsys):
    assert main(["--src", "a", "--dst", "b", "--dtype", "int4"]) == 2
    assert "int4" in capsys.readouterr().err


def test_the_command_line_itself(src, tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "convert", "--src", str(src), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--dst", str(tmp_path / "dst"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "30 tensors" in done.stdout
    (src / SHARDS[0]).write_bytes(b"")
    failed = run("--dst", str(tmp_path / "other"))
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
