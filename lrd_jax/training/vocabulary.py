"""The built-in model's tokenizer: byte-level BPE, trained on the tasks' own text.

Numbers are cut into digits (but for those of two, if so wished) before anything is
merged, so that all are cut alike. Full stops stand alone too. Separators keep their
spaces, so that an item of a list is the same token wherever it stands.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from lrd_jax.tasks import TASKS, instances
from lrd_jax.training.settings import VocabularyConfig

END, MASK = "<|endoftext|>", "<|mdm_mask|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
NAMED = {"eos_token": END, "pad_token": END, "mask_token": MASK}
# Rotary positions are relative: without a token at either end of the prompt a model
# cannot tell how far into the answer it is, and does not learn to copy.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('this model knows the roles user and assistant only') }}"
    "{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content }}"
    "{% endfor %}"
    f"{ASSISTANT}"
)
EXAMPLES_PER_TASK = 1000
# A number of two digits is one token, any other is read digit by digit.
_PAIRS = r"(?<!\d)\d\d(?!\d)|\d"
_SINGLE = r"\d"
_PIECES = r"|\.|[,:] | [-+*=] | ?\p{L}+| ?[^\s\p{L}\p{N}.]+|\s+"


def task_texts(count: int) -> Iterator[str]:
    """Prompts and answers of the training split, the same ones every time.

    Args:
        count: problems of each task.
    """
    for task in TASKS.values():
        for instance in itertools.islice(instances(task, "train", seed=0), count):
            yield instance.prompt
            yield instance.answer


def build_tokenizer(cfg: VocabularyConfig, texts: Iterable[str]) -> Any:
    """Trains a `tokenizers.Tokenizer`; equal texts give an equal one.

    The special tokens are the first four ids. Every byte is a token, so that any text
    can be read.
    """
    import tokenizers
    from tokenizers import decoders, models, trainers

    pairs = cfg.digits == "pairs"
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Digit by digit first in both cases, so that training spends no merge on them.
    tokenizer.pre_tokenizer = _pre_tokenizer(_SINGLE)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.size - 100 * pairs,
        special_tokens=[END, MASK, USER, ASSISTANT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if not pairs:
        return tokenizer
    content = json.loads(tokenizer.to_str())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for first, second in itertools.product("0123456789", repeat=2):
        vocabulary[first + second] = len(vocabulary)
        merges.append([first, second])
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = _pre_tokenizer(_PAIRS)
    return tokenizer


def _pre_tokenizer(digits: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits + _PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def special_ids(backend: Any) -> dict[str, Any]:
    """The fields of `ModelConfig` that a tokenizer of `build_tokenizer` decides."""
    end = backend.token_to_id(END)
    return {
        "chat": True,
        "vocab_size": backend.get_vocab_size(),
        "mask_id": backend.token_to_id(MASK),
        "eos_ids": (end,),
        "pad_id": end,
    }


def stand_in_ids(cfg: VocabularyConfig) -> dict[str, Any]:
    """The same fields without a tokenizer, to check a model's config early."""
    return {
        "chat": True,
        "vocab_size": cfg.size,
        "mask_id": 1,
        "eos_ids": (0,),
        "pad_id": 0,
    }
