"""A chat with a target and a trained drafter, in the terminal.

  python -m ppow_jax.chat --workdir=DIR [--run=NAME] [--shape=chain:3|tree:16x4x4|...] [--temperature=0]
  python -m ppow_jax.chat --workdir=DIR --prompt=TEXT [--trace=FILE.parquet|FILE.jsonl]
                          [--html=FILE] [--svg=FILE]

The text appears as it comes. Drafted tokens that the target accepts are green; those that it refuses stand
beside them, dim, red and struck through; its own tokens are underlined. Below each answer are its figures.
Without a terminal no colour is used, and refused tokens are left out. An empty line, or the end of the
input, ends the chat.
"""

import sys

from ppow_jax.parallel import memory

if __name__ == "__main__":
    memory.restart_with_tunables()  # before the imports below, which take a second or two

from absl import flags

from ppow_jax.chat.talk import Options, talk
from ppow_jax.errors import ConfigError
from ppow_jax.parallel import console

_WORKDIR = flags.DEFINE_string("workdir", "", "Of a run, whose target answers.")
_RUN = flags.DEFINE_string("run", "", "Which drafter, by its training run; empty: the last one.")
_SHAPE = flags.DEFINE_string("shape", "", "Of the drafts, as config.decode.shape; empty: the workdir's.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Longest answer.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of the target; 0: greedy.", lower_bound=0)
_PROMPT = flags.DEFINE_string("prompt", "", "Answers this alone, and ends.")
_COMPARE = flags.DEFINE_bool("compare", True, "Decodes each answer without the drafter too, for its speed.")
_TRACE = flags.DEFINE_string(
    "trace", "", "File for all rounds, with log-probabilities: .parquet (wants pyarrow) or .jsonl."
)
_HTML = flags.DEFINE_string("html", "", "File for a page with the conversation.")
_SVG = flags.DEFINE_string("svg", "", "File for a picture of the terminal with the conversation.")


def main(argv: list[str]) -> None:
    """Talks."""
    console.setup()
    if len(argv) > 1 or not _WORKDIR.value:
        raise ConfigError("expected --workdir=DIR of a run and flags only; see --help")
    how = (_TOKENS.value, _TEMPERATURE.value, _PROMPT.value, _COMPARE.value)
    written = (_TRACE.value, _HTML.value, _SVG.value)
    talk(Options(_WORKDIR.value, _RUN.value, _SHAPE.value, *how, *written))


if __name__ == "__main__":
    console.command(main, sys.modules[__name__])
