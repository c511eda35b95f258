"""The tests' GGUF files in the reader of transformers, which is not ours: it finds the same model.

    python gguf_files.py make --dir DIR       # with ppow_jax
    python gguf_files.py compare --dir DIR    # torch, transformers, gguf

`make` writes the families' small models as `test_gguf.py` does, which compares what our own reader makes of
them. `compare` reads them with transformers and compares every tensor with the one that was meant.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

TESTS = pathlib.Path(__file__).parents[1]


def make(directory: pathlib.Path) -> None:
    """One file a family."""
    sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "targets")]
    import test_gguf

    for name in test_gguf.FAMILIES:
        test_gguf.write_gguf(directory / f"{name}.gguf", name)


def compare(directory: pathlib.Path) -> int:
    """Prints the largest difference of each family; status 1 if a tensor is missing or differs."""
    import families
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    golden, bad = json.loads((TESTS / "golden/families.json").read_text())["cases"], 0
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise SystemExit(f"{directory}: no GGUF files; `make` writes them")
    for file in files:
        name = file.stem
        model = model_of(golden[name]["config"])
        found = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
        shapes = golden[name]["shapes"]
        missing = shapes.keys() - found.keys()
        differences = [
            np.abs(found[n].float().numpy() - families.weights(n, tuple(shape))).max()
            for n, shape in shapes.items()
            if n in found
        ]
        print(f"{name}: {len(differences)} tensors within {max(differences):.1e}, missing: {sorted(missing)}")
        bad += bool(missing) or max(differences) > 1e-6
    return int(bad > 0)


def model_of(config: dict):
    """Whose names the tensors are to have."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "compare"))
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="where the files are kept")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    if args.what == "compare":
        return compare(args.dir)
    make(args.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
