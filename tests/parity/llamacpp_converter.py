"""What llama.cpp's own converter makes of the files that we write for SGLang.

    python llamacpp_converter.py make --dir DIR                     # with ppow_jax
    python llamacpp_converter.py convert --dir DIR --llamacpp DIR   # with torch and transformers

`make` writes drafters as the `export` stage does. `convert` runs `convert_hf_to_gguf` of a checkout of
llama.cpp on them and writes types, shapes and hashes of its tensors, and its keys, to
`tests/golden/llamacpp.json`. `tests/drafters/test_llamacpp.py` holds our own GGUF files against it. The
tokenizer is left out: the drafters' target is none that llama.cpp knows.
"""

import argparse
import json
import pathlib
import sys

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "llamacpp.json"


def make(directory: pathlib.Path) -> None:
    """Drafters, and what the converter reads of their target."""
    import drafter_files

    target = drafter_files.TARGET
    about = {"vocab_size": target.vocab_size, "num_hidden_layers": target.layers, "hidden_size": target.width}
    (directory / "target").mkdir(parents=True, exist_ok=True)
    (directory / "target" / "config.json").write_text(json.dumps(about))
    for name, config in drafter_files.CONVERTED.items():
        drafter_files.write(directory / name, config, params=drafter_files.numbered(config))


def convert(directory: pathlib.Path, checkout: pathlib.Path) -> None:
    """Writes the golden file."""
    sys.path[:0] = [str(checkout), str(checkout / "gguf-py")]
    import gguf
    from conversion.llama import LlamaModel
    from golden_llamacpp import DIVISORS, described

    LlamaModel.set_vocab = lambda self: None
    golden = {}
    for source in sorted(p.parent for p in directory.glob("*/model.safetensors")):
        out = directory / f"{source.name}.gguf"
        options = {"target_model_dir": directory / "target", "eager": True}
        LlamaModel(source, gguf.LlamaFileType.ALL_F32, out, **options).write()
        reader = gguf.GGUFReader(out)
        golden[source.name] = {
            "tensors": {t.name: described(t) for t in reader.tensors if t.name != DIVISORS},
            "divisors": [t.data.tolist() for t in reader.tensors if t.name == DIVISORS],
            "keys": {
                key.removeprefix("eagle3."): field.contents()
                for key, field in reader.fields.items()
                if key.startswith("eagle3.")
            },
        }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "helpers"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["make", "convert"])
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    parser.add_argument("--llamacpp", type=pathlib.Path)
    given = parser.parse_args()
    if given.command == "make":
        make(given.dir)
    else:
        convert(given.dir, given.llamacpp)
