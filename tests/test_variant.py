"""Tests of convert.variant: what the names say."""

import pytest
import standin

from convert.variant import variant_of


@pytest.mark.parametrize(
    ("folder", "name", "want"),
    [
        ("LLaDA-8B-Instruct", None, "instruct"),
        ("LLaDA-8B-Base", None, "base"),
        ("LLaDA-1.5", None, "instruct"),
        ("models--GSAI-ML--LLaDA-8B-Instruct/snapshots/08b83a6", None, "instruct"),
        ("models--GSAI-ML--LLaDA-1.5/snapshots/08b83a6", None, "instruct"),
        ("base/llada_8b_instruct", None, "instruct"),
        ("instruct/llada_8b_base", None, "base"),
        ("x", "GSAI-ML/LLaDA-8B-Base", "base"),
        ("x", "GSAI-ML/LLaDA-8B-Instruct", "instruct"),
        ("LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Base", None),
        ("from-base-to-instruct", None, None),
        ("database/x", None, None),
        ("v11.5/step-1.52", None, None),
    ],
)
def test_the_names_tell_the_variant(tmp_path, folder, name, want):
    src = tmp_path / "llada" / folder
    src.mkdir(parents=True)
    standin.write_json(src / "config.json", {"_name_or_path": name} if name else {})
    assert variant_of(src, "llada") == want


def test_links_count_by_both_names(tmp_path):
    target = tmp_path / "LLaDA-8B-Instruct"
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    assert variant_of(tmp_path / "link", "llada") == "instruct"
    (tmp_path / "LLaDA-8B-Base").symlink_to(target)
    assert variant_of(tmp_path / "LLaDA-8B-Base", "llada") is None


def test_only_llada_has_a_1_5(tmp_path):
    assert variant_of(tmp_path / "v1.5", "llada") == "instruct"
    assert variant_of(tmp_path / "v1.5", "dream") is None
