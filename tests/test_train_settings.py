"""The config file and the flags of training, without a model."""

import pytest

from lrd_jax.settings import shipped_configs
from lrd_jax.train import parse
from lrd_jax.training.settings import TrainConfig, read_recipe
from tests.standin import user_error

GOOD = """
[train]
steps = 10
warmup_steps = 2
batch_size = 4
windows = [8, 16]
[model]
d_model = 16
[vocabulary]
size = 300
[[phase]]
fraction = 0.5
weights = { copy = 1 }
[[phase]]
fraction = 0.5
windows = [4]
weights = { facts = 1, products = 2.5 }
"""


def write(tmp_path, text=GOOD, **replaced):
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "a.toml"
    path.write_text(text)
    return str(path)


def arguments(tmp_path, *flags, text=GOOD):
    return ["--config", write(tmp_path, text), "--out", "O", *flags]


def test_a_file_is_read(tmp_path):
    request = parse(arguments(tmp_path))
    assert request.cfg == TrainConfig(
        steps=10, batch_size=4, windows=(8, 16), warmup_steps=2
    )
    recipe = request.recipe
    assert recipe.model == {"d_model": 16}
    assert recipe.vocabulary.size == 300
    assert [phase.windows for phase in recipe.phases] == [None, (4,)]
    assert recipe.phases[1].weights == {"facts": 1, "products": 2.5}
    assert (request.out, request.init, request.data, request.plot) == (
        "O", None, None, None,
    )  # fmt: skip
    assert not request.export


def test_flags_go_before_the_file(tmp_path):
    flags = "--train.steps 20 --train.windows 4 5 6 --train.soft-input 0.5".split()
    request = parse(arguments(tmp_path, *flags, "--train.soft-r-f", "0.1", "0.2"))
    assert (request.cfg.steps, request.cfg.windows) == (20, (4, 5, 6))
    assert (request.cfg.soft_input, request.cfg.soft_r_f) == (0.5, (0.1, 0.2))
    assert request.cfg.batch_size == 4


def test_fine_tuning_needs_no_file():
    flags = "--out O --init C --data D --plot P.png --export --train.steps 200"
    more = "--train.batch-size 2 --train.windows 8"
    request = parse([*flags.split(), *more.split()])
    assert (request.init, request.data, request.plot) == ("C", "D", "P.png")
    assert request.export


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("steps", "0", "at least 1"),
        ("batch_size", "0", "at least 1"),
        ("windows", "[]", "one or more lengths"),
        ("windows", "[0]", "at least 1"),
        ("seed", "-1", "in \\[0"),
        ("learning_rate", "0.0", "above 0"),
        ("adam_learning_rate", "-1.0", "above 0"),
        ("warmup_steps", "10", "below `steps`"),
        ("final_rate", "2.0", "in \\[0, 1\\]"),
        ("weight_decay", "-1.0", "0 or more"),
        ("adam_b2", "1.0", "in \\[0, 1\\)"),
        ("clip_norm", "0.0", "above 0"),
        ("average_decay", "1.0", "in \\[0, 1\\)"),
        ("pool_batches", "0", "at least 1"),
        ("soft_input", "1.5", "in \\[0, 1\\]"),
        ("soft_r_f", "[0.5]", "two numbers"),
        ("soft_r_f", "[0.5, 0.2]", "low <= high"),
        ("soft_top_p", "0.0", "in \\(0, 1\\]"),
        ("log_steps", "0", "at least 1"),
        ("save_seconds", "0.0", "above 0"),
        ("stepz", "1", "steps"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, name, value, named):
    lines = [x for x in GOOD.splitlines() if not x.startswith(f"{name} =")]
    lines.insert(lines.index("[train]") + 1, f"{name} = {value}")
    with pytest.raises(ValueError, match=rf"{name}.*{named}"):
        parse(arguments(tmp_path, text="\n".join(lines)))


def test_adam_beside_muon_only(tmp_path):
    flags = "--train.optimiser adamw --train.adam-learning-rate 0.1".split()
    with user_error("adam_learning_rate", "left out unless"):
        parse(arguments(tmp_path, *flags))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[model]", "[modle]", ("'modle'", "model")),
        ("size = 300", "sise = 300", ("[vocabulary]", "'sise'", "size")),
        ("size = 300", "size = 200", ("[vocabulary]", "size", "at least 260")),
        ("size = 300", 'size = 300\ndigits = "pairs"', ("at least 360",)),
        ("windows = [4]", "window = [4]", ("[[phase]] 2", "'window'", "windows")),
        ("windows = [4]", "windows = [0]", ("[[phase]] 2", "windows")),
        ("windows = [4]", "batch_size = 0", ("[[phase]] 2", "batch_size")),
        ("copy = 1", "copy = -1", ("[[phase]] 1", "weights.copy", "above 0")),
        ("{ copy = 1 }", "{}", ("[[phase]] 1", "weights")),
        ("weights = { copy = 1 }", "", ("[[phase]] 1", "missing: weights")),
        ("fraction = 0.5\nweights", "fraction = 0.6\nweights", ("add up to 1", "1.1")),
        ("fraction = 0.5\nweights", "fraction = 0.0\nweights", ("fraction", "(0, 1]")),
        ("[model]", "[[model]]", ("`model` must be a table",)),
    ],
)
def test_a_wrong_table_is_named(tmp_path, old, new, named):
    assert old in GOOD
    with user_error("a.toml", *named):
        read_recipe(write(tmp_path, GOOD.replace(old, new)))


def test_the_vocabulary_decides_its_ids(tmp_path):
    recipe = read_recipe(write(tmp_path))
    with user_error("[model]", "missing: family"):
        recipe.model_config(vocab_size=300, mask_id=1, eos_ids=(0,), pad_id=0)
    recipe = read_recipe(write(tmp_path, d_model="mask_id"))
    with user_error("[model]", "'mask_id'", "the vocabulary does"):
        recipe.model_config(vocab_size=300)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--out O", "[[phase]]"),
        ("--out O --data D", "--init"),
        ("--config nowhere.toml --out O", "no config file"),
    ],
)
def test_what_is_missing_is_named(flags, named):
    needed = "--train.steps 200 --train.batch-size 2 --train.windows 8".split()
    with user_error(named):
        parse([*flags.split(), *needed])


def test_the_shipped_recipe_is_right():
    recipe = read_recipe(str(shipped_configs()["tiny_train"]))
    parse(["--config", "tiny_train", "--out", "O"])
    parse(["--config", "tiny_finish", "--init", "tiny", "--out", "O"])
    cfg = recipe.model_config(vocab_size=384, mask_id=1, eos_ids=(0,), pad_id=0)
    assert cfg.family == "llada"
