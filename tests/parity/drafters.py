"""Our drafter's files in the modules of EAGLE, SpecForge and the speculators library, and theirs in ours.

    python drafters.py make --dir DIR [--scaling linear|llama3]   # with ppow_jax
    python drafters.py reference --dir DIR --eagle CHECKOUT --specforge CHECKOUT
    python drafters.py compare --dir DIR      # with ppow_jax

`make` writes random drafters as the `export` stage does, and inputs. `reference` (torch, transformers,
speculators) loads them into each library's own module, refusing missing and unexpected tensors, steps through
windows of five and saves them in the library's own form. `compare` reads those files and compares parameters,
bit for bit, and logits.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

VOCAB, DRAFT, WIDTH, LENGTH, STEPS = 96, 64, 32, 20, 5
ANCHORS = (0, 3, 9, 14)
TOLERANCE = 1e-4
LIBRARIES = {"eagle": "sglang", "specforge": "sglang", "speculators": "vllm"}  # and the form that each reads
SCALINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def libraries(directory: pathlib.Path) -> dict[str, str]:
    """Those that know the drafter's scaling."""
    scaling = json.loads((directory / "sglang/config.json").read_text())["rope_scaling"] or {}
    return {k: v for k, v in LIBRARIES.items() if k != "eagle" or scaling.get("rope_type") != "llama3"}


def make(directory: pathlib.Path, scaling: dict[str, Any]) -> None:
    """Drafters and inputs."""
    import jax

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "helpers"))
    import small

    from ppow_jax.drafters import eagle3
    from ppow_jax.drafters.files import writing

    target = dataclasses.replace(
        small.TINY, vocab_size=VOCAB, width=WIDTH, head_size=8, layers=9, taps=(2, 4, 6), rope_theta=10_000.0
    )
    config = eagle3.drafter_config(target, DRAFT, 48, "float32")
    config = dataclasses.replace(config, rope_scaling=tuple(scaling.items()))
    rng = np.random.default_rng(0)
    vocab = np.sort(rng.permutation(VOCAB)[:DRAFT])
    params = jax.tree.map(np.asarray, small.randomise(eagle3.abstract_params(config), 1))
    for server in set(LIBRARIES.values()):
        writing.write(directory / server, config, params, vocab, target, server, "float32", "parity")
    np.savez(
        directory / "inputs.npz",
        embedding=rng.standard_normal((VOCAB, WIDTH)).astype(np.float32),
        taps=rng.standard_normal((LENGTH, 3 * WIDTH)).astype(np.float32),
        tokens=rng.integers(0, VOCAB, LENGTH),
    )
    (directory / "target.json").write_text(json.dumps(dataclasses.asdict(target)))


class Steps:
    """A library's drafter: `features` of taps, and a decoder `layer` on a whole sequence."""

    def __init__(self, features: Any, layer: Any, logits: Any) -> None:
        self.features, self.layer, self.logits = features, layer, logits


def eagle(directory: pathlib.Path, checkout: pathlib.Path, inputs: Any, out: pathlib.Path) -> Steps:
    """SafeAILab/EAGLE, `eagle/model/cnets.py`; what is tapped is stepped as its `topK_genrate` does."""
    import torch
    from safetensors.torch import load_file, save_file

    sys.path.insert(0, str(checkout / "eagle/model"))
    from cnets import Model

    from configs import EConfig

    values = json.loads((directory / "config.json").read_text())
    scaling = values.pop("rope_scaling")
    config = EConfig(**values)
    # it knows older keys only, and transformers 5 puts newer ones there
    config.rope_scaling = scaling and {"type": scaling["rope_type"], "factor": scaling["factor"]}
    model = Model(config, bias=False).eval()
    model.init_tree()
    state = load_file(directory / "model.safetensors")
    check(model.load_state_dict(state, strict=False))
    model.embed_tokens.weight.data = torch.from_numpy(inputs["embedding"])
    kept = {name: value for name, value in model.state_dict().items() if "embed_tokens" not in name}
    save_file(kept, out / "model.safetensors")

    def layer(ids: Any, hidden: Any) -> Any:
        return model(hidden, input_ids=ids)

    return Steps(model.fc, layer, lambda h: model.lm_head(model.norm(h)))


def specforge(directory: pathlib.Path, checkout: pathlib.Path, inputs: Any, out: pathlib.Path) -> Steps:
    """sgl-project/SpecForge, `specforge/modeling/draft/llama3_eagle.py`."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig

    sys.path.insert(0, str(checkout))
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3, prepare_decoder_attention_mask

    config = LlamaConfig.from_pretrained(str(directory))
    model = LlamaForCausalLMEagle3(config, attention_backend="sdpa").eval()
    check(model.load_state_dict(load_file(directory / "model.safetensors"), strict=False))
    model.embed_tokens.weight.data = torch.from_numpy(inputs["embedding"])
    kept = {name: value for name, value in model.state_dict().items() if "embed" not in name}
    save_file(kept, out / "model.safetensors")

    def layer(ids: Any, hidden: Any) -> Any:
        embedded, (_, T) = model.embed_input_ids(ids), ids.shape
        mask = prepare_decoder_attention_mask(torch.ones(1, T, dtype=torch.bool), (1, T), embedded, 0)
        return model.backbone(embedded, hidden, None, mask, torch.arange(T)[None])

    return Steps(model.project_hidden_states, layer, model.compute_logits)


def speculators(directory: pathlib.Path, checkout: None, inputs: Any, out: pathlib.Path) -> Steps:
    """The speculators library, `speculators/models/eagle3/core.py`."""
    import torch
    from safetensors.torch import load_file
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    values = json.loads((directory / "config.json").read_text())
    inner = LlamaConfig.from_pretrained(str(directory))
    inner._attn_implementation = "eager"
    about = SpeculatorsConfig(
        algorithm="eagle3",
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=[]),
    )
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=inner,
        draft_vocab_size=values["draft_vocab_size"],
        norm_before_residual=False,
        speculators_config=about,
    )
    model = Eagle3DraftModel(config).eval()
    check(model.load_state_dict(load_file(directory / "model.safetensors"), strict=False))
    model.embed_tokens.weight.data = torch.from_numpy(inputs["embedding"])
    model.save_pretrained(out)

    def layer(ids: Any, hidden: Any) -> Any:
        T = ids.shape[1]
        positions = torch.arange(T)[None]
        x = torch.cat([model.embed_tokens(ids), hidden], -1)
        mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
        embeddings = model.rotary_emb(x, positions)
        for one in model.layers:
            x = one(x, attention_mask=mask, position_ids=positions, position_embeddings=embeddings)
        return x

    return Steps(model.fc, layer, lambda h: model.lm_head(model.norm(h)))


def check(found: Any) -> None:
    """Nothing but the target's own tensors may be missing, and nothing may be left over."""
    missing = [n for n in found.missing_keys if not n.startswith(("embed_tokens", "verifier_"))]
    if missing or found.unexpected_keys:
        raise SystemExit(f"missing {missing}, unexpected {found.unexpected_keys}")


def reference(directory: pathlib.Path, checkouts: dict[str, pathlib.Path | None]) -> None:
    """Logits `[anchors, STEPS, DRAFT]` of every library, windows of the text itself."""
    import torch

    inputs = np.load(directory / "inputs.npz")
    taps, tokens = torch.from_numpy(inputs["taps"])[None], torch.from_numpy(inputs["tokens"])[None]
    for name, server in libraries(directory).items():
        out = directory / name
        out.mkdir(exist_ok=True)
        with torch.no_grad():
            steps = globals()[name](directory / server, checkouts.get(name), inputs, out)
            if not (out / "config.json").exists():
                (out / "config.json").write_text((directory / server / "config.json").read_text())
            logits = [window(steps, taps, tokens, anchor) for anchor in ANCHORS]
        np.save(directory / f"{name}.npy", np.stack(logits))
        print(f"{name}: done")


def window(steps: Steps, taps: Any, tokens: Any, anchor: int) -> np.ndarray:
    """Logits `[STEPS, DRAFT]` from one anchor: the features up to it, then the drafter's own states."""
    import torch

    hidden, logits = steps.features(taps[:, : anchor + 1]), []
    for step in range(STEPS):
        state = steps.layer(tokens[:, 1 : anchor + 2 + step], hidden)[:, -1:]
        logits.append(steps.logits(state)[0, 0].numpy())
        hidden = torch.cat([hidden, state], 1)
    return np.stack(logits)


def compare(directory: pathlib.Path) -> int:
    """Prints a table; status 1 if anything differs."""
    import jax
    import jax.numpy as jnp

    from ppow_jax.drafters import windows
    from ppow_jax.drafters.eagle3 import Drafter, weights_of
    from ppow_jax.drafters.files import reading
    from ppow_jax.models.target import TargetConfig

    values = json.loads((directory / "target.json").read_text())
    target = TargetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    inputs, bad = np.load(directory / "inputs.npz"), 0
    taps, tokens = jnp.asarray(inputs["taps"])[None], jnp.asarray(inputs["tokens"], jnp.int32)[None]
    anchors = jnp.array([ANCHORS])
    for name, server in libraries(directory).items():
        own = reading.read(directory / server, target, "parity")
        theirs = reading.read(directory / name, target, "parity")
        embedding = theirs.params.pop("embedding", None)
        same = jax.tree.all(jax.tree.map(np.array_equal, own.params, theirs.params))
        same &= embedding is None or np.array_equal(embedding["embedding"], inputs["embedding"])
        known = {"embedding": {"embedding": jnp.asarray(inputs["embedding"])}}
        weights = weights_of(theirs.params, known, jnp.asarray(theirs.vocab))
        drafter = Drafter(dataclasses.replace(theirs.config, embedding_size=0))
        prefix = windows.text_prefix(drafter, weights, taps, tokens)
        start = windows.text_starts(prefix, tokens, anchors)
        along = lambda step, _, x, __: (windows.text_ahead(tokens, anchors, step), x)  # noqa: E731
        found = windows.window_pass(drafter, weights, prefix.keys_values, start, along, STEPS)
        difference = np.abs(
            np.moveaxis(np.asarray(found)[0, :, 0], -1, 1) - np.load(directory / f"{name}.npy")
        )
        print(f"{name}: parameters {'the same' if same else 'DIFFER'}, logits within {difference.max():.1e}")
        bad += not same or difference.max() > TOLERANCE
    return int(bad > 0)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "reference", "compare"))
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="where everything is kept")
    parser.add_argument("--scaling", choices=SCALINGS, default="none", help="of the rotary wavelengths")
    parser.add_argument("--eagle", type=pathlib.Path, help="a checkout of SafeAILab/EAGLE")
    parser.add_argument("--specforge", type=pathlib.Path, help="a checkout of sgl-project/SpecForge")
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    if args.what == "make":
        make(args.dir, SCALINGS[args.scaling])
    elif args.what == "reference":
        reference(args.dir, {"eagle": args.eagle, "specforge": args.specforge})
    else:
        return compare(args.dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
