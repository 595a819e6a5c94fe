"""The direction of imports, read from the import statements themselves.

    errors, settings, config, base  <-  model, decode, text, tasks  <-  all the rest

(`quantization`, a few names, goes with config.)

`decode` sees a model only as a `Denoiser`; `convert` is used by nobody.
"""

import ast
import functools
import pathlib

import pytest

import lrd_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]
# In the order in which each may import those before it.
FOUNDATION = [
    f"lrd_jax.{name}"
    for name in ("errors", "settings", "config", "quantization", "base")
]
# Slow to import (2 s), or not installed with the package.
LAZY = ("transformers", "torch")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in ("lrd_jax", "convert")
    for path in sorted((ROOT / package).rglob("*.py"))
}
OURS = [name for name in MODULES if name.split(".")[0] == "lrd_jax"]


@functools.cache
def imported(name, inside_functions=True):
    """Names of all that a module imports; `from a import b` gives both a and a.b."""
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if inside_functions or not function:
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return found


def within(found, *packages):
    """Those of the imported names that are one of the packages or lie in one."""
    return {
        name
        for name in found
        if any(
            name == package or name.startswith(package + ".") for package in packages
        )
    }


def modules_in(*packages):
    return sorted(within(MODULES, *packages))


@pytest.mark.parametrize("name", FOUNDATION)
def test_the_foundation_imports_only_what_lies_below_it(name):
    below = FOUNDATION[: FOUNDATION.index(name)]
    ours = within(imported(name), "lrd_jax")
    assert ours == within(ours, *below)


@pytest.mark.parametrize("name", modules_in("lrd_jax.model"))
def test_model_imports_the_foundation_only(name):
    ours = within(imported(name), "lrd_jax") - {"lrd_jax"}
    assert ours == within(ours, *FOUNDATION, "lrd_jax.model")


@pytest.mark.parametrize("name", modules_in("lrd_jax.decode"))
def test_decode_imports_the_foundation_only(name):
    # So it never imports the model: a `Denoiser` is all it sees.
    ours = within(imported(name), "lrd_jax") - {"lrd_jax"}
    assert ours == within(ours, *FOUNDATION, "lrd_jax.decode")


@pytest.mark.parametrize("name", modules_in("lrd_jax.text", "lrd_jax.tasks"))
def test_text_knows_neither_model_nor_decoding(name):
    upper = ("lrd_jax.model", "lrd_jax.decode", "lrd_jax.generate", "lrd_jax.train")
    assert not within(imported(name), *upper)


@pytest.mark.parametrize("name", modules_in("lrd_jax.checkpoint", "lrd_jax.sharding"))
def test_checkpoints_and_sharding_know_no_decoding(name):
    upper = ("lrd_jax.decode", "lrd_jax.generate", "lrd_jax.train", "torch")
    assert not within(imported(name), *upper)


@pytest.mark.parametrize("name", OURS)
def test_lrd_jax_never_imports_convert(name):
    assert not within(imported(name), "convert")


@pytest.mark.parametrize("name", OURS)
def test_nobody_imports_a_command(name):
    commands = (
        "lrd_jax.generate",
        "lrd_jax.train",
        "lrd_jax.evaluate",
        "lrd_jax.bench",
    )
    assert not within(imported(name), *commands)


@pytest.mark.parametrize("name", MODULES)
def test_nnx_stays_in_the_model(name):
    nnx = within(imported(name), "flax.nnx")
    assert not nnx or name in modules_in("lrd_jax.model")


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_are_imported_inside_functions_only(name):
    assert not within(imported(name, inside_functions=False), *LAZY)


@pytest.mark.parametrize("name", lrd_jax.__all__)
def test_a_public_name_is_there(name):
    public = getattr(lrd_jax, name)
    assert public.__name__ == name
    assert name in dir(lrd_jax)


def test_the_public_names_are_sorted_and_single():
    assert lrd_jax.__all__ == sorted(set(lrd_jax.__all__))


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = lrd_jax.lode


def test_the_imports_of_this_very_file_are_found():
    MODULES["tests.test_imports"] = pathlib.Path(__file__)
    try:
        assert {"ast", "pathlib", "pytest", "lrd_jax"} <= imported("tests.test_imports")
    finally:
        del MODULES["tests.test_imports"]
