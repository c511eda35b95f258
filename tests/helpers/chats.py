"""A tokenizer of bytes with a few special tokens, for chat templates of tests."""

from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ppow_jax.targets.tokenizer import Tokenizer, with_stops

START, END, TEXT_END = 256, 257, 258  # <s>, <e>, <eot>
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# The thinking of earlier turns is dropped, and every answer begins with it.
THINKING = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}<s>{{ m.role }}\n{{ c }}<e>\n{% endfor %}"
    "<s>assistant\n<think>"
)
TAGGED = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<e>{% endgeneration %}{% else %}{{ m.content }}<e>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def tokenizer(template: str = CHATML, **variables: Any) -> Tokenizer:
    """Ids 0 to 255 are bytes in the order of GPT-2's alphabet; `<e>` and `<eot>` end a turn."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "<e>", "<eot>"])
    return with_stops(Tokenizer(core, template, (TEXT_END, END), {"eos_token": "<eot>"} | variables))


def blank_first(template: str = "") -> Tokenizer:
    """As of Llama 2 and Mistral: a blank is put before the first word of a text, and taken away again."""
    vocab = {"<s>": 0, "</s>": 1, "\u2581": 2} | {letter: 3 + i for i, letter in enumerate("abc[]\n/")}
    core = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(core, template, (1,), {})
