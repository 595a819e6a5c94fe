import hashlib
import json

import pytest

from lrd_jax.errors import UserError
from lrd_jax.jobs import Job, jobs_from_file, jobs_from_prompts


def write(tmp_path, *lines):
    path = tmp_path / "in.jsonl"
    data = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(b"\n".join(data))
    return str(path)


def test_the_three_kinds(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    path = write(
        tmp_path,
        '{"prompt": "a\\u2028b"}',
        json.dumps({"messages": messages, "id": "m"}),
        '{"prompt_ids": [1, 2], "open": [1], "id": 7}',
    )
    jobs, sha256 = jobs_from_file(path)
    where = f"{path}, line "
    assert jobs == [
        Job(id=0, line=0, where=where + "1", prompt="a\u2028b"),
        Job(id="m", line=1, where=where + "2", messages=messages),
        Job(id=7, line=2, where=where + "3", prompt_ids=[1, 2], open=[1]),
    ]
    with open(path, "rb") as file:
        assert sha256 == hashlib.sha256(file.read()).hexdigest()


def test_blank_lines_count_and_are_no_jobs(tmp_path):
    lines = ["", '{"prompt": "a"}\r', "  ", '{"prompt": "b\u2028"}', ""]
    jobs, _ = jobs_from_file(write(tmp_path, *lines))
    assert [(job.id, job.line, job.where[-6:]) for job in jobs] == [
        (1, 1, "line 2"),
        (3, 3, "line 4"),
    ]


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    jobs, _ = jobs_from_file(write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}'))
    assert jobs[0].prompt == "a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "line 2: not valid JSON"),
        ('{"prompt": "a"} x', "line 2: not valid JSON"),
        (b'{"prompt": "\xff"}', "line 2: not valid UTF-8"),
        ("[" * 100_000, "line 2: not valid JSON: nested too deeply"),
        ("[1]", "line 2: must be a JSON object, got [1]"),
        ("{}", "line 2: must have exactly one of prompt, messages, prompt_ids; it has"),
        ('{"id": 3}', "it has none"),
        ('{"prompt": "a", "prompt_ids": [1]}', "it has prompt and prompt_ids"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: not valid JSON: a key is given tw"),
        ('{"promt": "a"}', "line 2: unknown key 'promt'; known: prompt, messages"),
        ('{"prompt": null}', "line 2: must be a text, got None"),
        ('{"prompt": 3}', "line 2: must be a text, got 3"),
        ('{"prompt": "\\ud800"}', "line 2: not valid Unicode text"),
        ('{"messages": "hi"}', "line 2: `messages` must be a list, got 'hi'"),
        ('{"prompt_ids": "1 2"}', "`prompt_ids` must be a list of whole numbers"),
        ('{"prompt_ids": [1.0]}', "`prompt_ids` must be a list of whole numbers"),
        ('{"prompt_ids": [true]}', "`prompt_ids` must be a list of whole numbers"),
        ('{"prompt_ids": [1], "open": 0}', "`open` must be a list of whole numbers"),
        ('{"prompt": "a", "open": [0]}', '"open" goes with "prompt_ids" only'),
        ('{"prompt": "a", "id": 1.5}', "`id` must be a string or a whole number"),
        ('{"prompt": "a", "id": null}', "`id` must be a string or a whole number"),
        ('{"prompt": "a", "id": true}', "`id` must be a string or a whole number"),
        ('{"prompt": "a", "id": "\\udc00"}', "line 2: not valid Unicode text"),
        ('{"prompt": "a", "id": 0}', "line 2: id 0 is taken by line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    with pytest.raises(UserError) as caught:
        jobs_from_file(write(tmp_path, '{"prompt": "fine"}', line))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_id_that_looks_like_a_line_number_is_taken(tmp_path):
    lines = ['{"prompt": "a", "id": 1}', '{"prompt": "b"}']
    with pytest.raises(UserError, match="line 2: id 1 is taken by line 1"):
        jobs_from_file(write(tmp_path, *lines))


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_jobs(tmp_path, lines):
    with pytest.raises(UserError, match="has no prompts in it"):
        jobs_from_file(write(tmp_path, *lines))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read: No such file"):
        jobs_from_file(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        jobs_from_file(str(tmp_path))


def test_prompts_of_the_command_line():
    jobs, sha256 = jobs_from_prompts(["a", "b"])
    assert [(job.id, job.line, job.prompt) for job in jobs] == [
        (0, 0, "a"),
        (1, 1, "b"),
    ]
    assert sha256 != jobs_from_prompts(["a b"])[1]
    with pytest.raises(UserError, match="--prompt: not valid Unicode"):
        jobs_from_prompts(["\udcff"])
