"""Models of every family with weights that follow from their names, and golden values of them.

tests/parity made the golden file with transformers on torch.
"""

import importlib.util
import json
import pathlib

import numpy as np
import safetensors.numpy

from ppow_jax.models.target import Target
from ppow_jax.parallel import partition
from ppow_jax.targets import huggingface

TESTS = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((TESTS / "golden/families.json").read_text("utf-8"))["cases"]
spec = importlib.util.spec_from_file_location("parity_families", TESTS / "parity/families.py")
parity = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parity)
POSITIONS, TEXT = list(parity.POSITIONS), parity.text()[None].astype(np.int32)


def write(directory: pathlib.Path, name: str, shards: int = 1) -> pathlib.Path:
    """The family's model as transformers would save it."""
    directory.mkdir(exist_ok=True)
    case = GOLDEN[name]
    tensors = {n: parity.weights(n, tuple(shape)) for n, shape in case["shapes"].items()}
    (directory / "config.json").write_text(json.dumps(case["config"]))
    if shards == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return directory
    where = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(tensors)}
    for file in set(where.values()):
        part = {n: tensors[n] for n in tensors if where[n] == file}
        safetensors.numpy.save_file(part, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def load(directory: pathlib.Path, dtype: str = "float32"):
    config, params = huggingface.load(directory, dtype, partition.make_mesh((-1, 1, 1)))
    return Target(config), params
