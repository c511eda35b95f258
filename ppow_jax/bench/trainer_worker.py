"""Another trainer's step of EAGLE-3: a process of its own, spoken to in lines.

    python trainer_worker.py TRAINER INPUTS.npz [DIRECTORY]

answers a line of JSON when it is ready, `{"version": ..., "positions": n, "rate": r}`: how many losses a step
has, and the operations a second of a large float32 matrix product in its framework. To every line that it
reads it takes a step and answers `{"seconds": s, "bytes": n, "loss": x}`, n being the most memory that it has
held. It imports nothing of ours, so that trainers may live in environments of their own.

Trainers are `speculators`, `specforge` and `specjax`, the last one read from DIRECTORY. Each is called as its
own training loop calls it, in float32, on features that were made before. Their targets have the draft
vocabulary alone, so that none computes probabilities of tokens that it leaves out.
"""

import contextlib
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

DECAY = 0.8
RATE = 1e-4  # of learning; nothing depends on it

Step = Callable[[], float]  # takes a step, and returns its loss


def specjax(given: dict[str, Any], directory: str) -> tuple[Step, int, str]:
    """SpecJAX's `make_train_step_ttt`, and its loop's optimiser around it."""
    sys.path.insert(0, directory)
    if "transformers" not in sys.modules:
        with contextlib.suppress(ImportError):
            import transformers  # noqa: F401
    if "transformers" not in sys.modules:  # it wants a tokenizer, which a step does not
        stand_in: Any = types.ModuleType("transformers")
        stand_in.AutoTokenizer = None
        sys.modules["transformers"] = stand_in
    import jax
    import jax.numpy as jnp
    import optax
    from specjax.models.draft.eagle3 import Eagle3Config, init_eagle3_params
    from specjax.train import make_train_step_ttt
    from specjax.training.optimizer import build_optimizer

    shape, K = given["shape"], int(given["window"])
    config = Eagle3Config(
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_hidden"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["head_size"],
        vocab_size=shape["vocab_size"],
        draft_vocab_size=shape["vocab_size"],
        rope_theta=shape["rope_theta"],
        ttt_decay=DECAY,
    )

    def target(ids: Any, mask: Any, known: dict, _: Any) -> tuple:
        logits = known["hidden"] @ known["head"].T
        return known["hidden"], known["embedding"], known["taps"], logits

    params = init_eagle3_params(config, jax.random.key(0))
    state = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    optimizer, _ = build_optimizer(RATE, 10, 1000)
    opt_state = optimizer.init(state)
    train_step = make_train_step_ttt(target, None, config, K)
    known = {k: jnp.asarray(given[k]) for k in ("hidden", "head", "embedding", "taps")}
    ids = jnp.arange(shape["vocab_size"])
    batch = {"input_ids": given["tokens"], "attention_mask": np.ones_like(given["tokens"])}

    def step() -> float:
        nonlocal state, opt_state
        loss, _, _, grads = train_step(state, known, ids, ids, batch)
        updates, opt_state = optimizer.update(grads, opt_state, state)
        state = optax.apply_updates(state, updates)
        jax.block_until_ready(state)
        return float(loss)

    B, T = given["tokens"].shape
    return step, B * K * (T - 1) - B * K * (K - 1) // 2, f"jax {jax.__version__}"


def _llama(given: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    shape = given["shape"]
    return LlamaConfig(
        hidden_size=shape["width"],
        intermediate_size=shape["mlp_hidden"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_size"],
        vocab_size=shape["vocab_size"],
        num_hidden_layers=1,
        max_position_embeddings=8 * given["tokens"].shape[1],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        pad_token_id=0,
    )


def _torch_step(loss_of: Callable[[], Any], model: Any, optimizer: Any, clip: float) -> Step:
    import torch

    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return float(loss.detach())

    return step


def speculators(given: dict[str, Any], directory: str) -> tuple[Step, int, str]:
    """speculators' `Eagle3DraftModel`, compiled as on a GPU; all texts in one row, as it packs them."""
    import importlib.metadata

    import torch
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    llama, K = _llama(given), int(given["window"])
    llama._attn_implementation = "simple_flex_attention" if torch.cuda.is_available() else "sdpa"
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=llama,
        draft_vocab_size=given["shape"]["vocab_size"],
        norm_before_residual=False,
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=K)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
    model = Eagle3DraftModel(config).float()
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.from_numpy(given["embedding"]))
        model.verifier_lm_head.weight.copy_(torch.from_numpy(given["head"]))
        model.lm_head.weight.copy_(torch.from_numpy(given["head"]))
        model.verifier_norm.weight.fill_(1.0)
    model.lm_head.weight.requires_grad = True
    B, T = given["tokens"].shape
    flat = lambda x: torch.from_numpy(x).reshape(1, B * T, *x.shape[2:])  # noqa: E731
    batch = {
        "hidden_states": flat(given["taps"]),
        "input_ids": torch.roll(flat(given["tokens"]).long(), -1, 1),
        "document_ids": torch.arange(B).repeat_interleave(T)[None],
        "loss_mask": torch.ones(1, B * T, dtype=torch.bool),
        "verifier_last_hidden_states": torch.roll(flat(given["hidden"]), -1, 1),
        "ttt_steps": K,
        "ttt_step_loss_decay": DECAY,
        "loss_config": resolve_loss_config("ce", "eager"),
    }
    forward = torch.compile(model.forward)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    step = _torch_step(lambda: forward(**batch)[1], model, optimizer, 1.0)
    version = importlib.metadata.version("speculators")
    return step, B * T * K - K * (K - 1) // 2, f"{version}, torch {torch.__version__}"


@contextlib.contextmanager
def _without_triton() -> Any:
    """Lets kernels for GPUs be imported where triton is not there; none of them runs."""
    import importlib.util

    if importlib.util.find_spec("triton"):
        yield
        return

    class Nothing(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Nothing(name)

        def __call__(self, *about: Any, **more: Any) -> Any:
            return about[0] if about else self

    triton: Any = Nothing("triton")
    triton.language = Nothing("triton.language")
    stand_ins = {"triton": triton, "triton.language": triton.language}
    sys.modules |= stand_ins
    yield
    for name in stand_ins:
        del sys.modules[name]


def specforge(given: dict[str, Any], directory: str) -> tuple[Step, int, str]:
    """SpecForge's `OnlineEagle3Model` with attention by torch; without a GPU its loss is that which it tests
    its kernel against."""
    import importlib.metadata

    import torch
    import transformers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    torch.compile(torch.sin)(torch.ones(2))  # what asks for triton has asked before it is made up
    with _without_triton():
        from specforge.algorithms.eagle3 import model as eagle3
        from specforge.core import loss as losses
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    if not torch.cuda.is_available():
        eagle3.LogSoftmaxLoss = types.SimpleNamespace(apply=losses._compute_loss)
    config, K = _llama(given), int(given["window"])
    config.draft_vocab_size = given["shape"]["vocab_size"]
    config.norm_output = False
    config.rope_scaling = None
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa").float()
    draft.embed_tokens.requires_grad_(False)
    model = eagle3.OnlineEagle3Model(draft, length=K, attention_backend="sdpa")
    head, hidden = (torch.from_numpy(given[name]) for name in ("head", "hidden"))
    tokens = torch.from_numpy(given["tokens"]).long()
    taps = torch.from_numpy(given["taps"])

    def loss_of() -> Any:
        with torch.no_grad():
            target = torch.roll(hidden, -1, 1) @ head.T
        losses_of_steps = model(
            input_ids=torch.roll(tokens, -1, 1),
            attention_mask=torch.ones_like(tokens),
            target=target,
            loss_mask=torch.ones_like(tokens)[..., None],
            hidden_states=taps,
        )[0]
        return sum(DECAY**i * loss for i, loss in enumerate(losses_of_steps))

    parameters = [p for p in model.parameters() if p.requires_grad]
    step = _torch_step(loss_of, model, torch.optim.AdamW(parameters, lr=RATE), 0.5)
    B, T = tokens.shape
    version = importlib.metadata.version("specforge")
    about = f"{version}, torch {torch.__version__}, transformers {transformers.__version__}"
    return step, B * K * T - B * K * (K - 1) // 2, about


TRAINERS = {"specjax": specjax, "speculators": speculators, "specforge": specforge}


def matrix_rate(library: str) -> float:
    """Operations a second of a large float32 matrix product of jax or torch."""
    if library == "jax":
        import jax
        import jax.numpy as jnp

        square, product = jnp.ones((2048, 2048)), jax.jit(lambda a: a @ a)
        once = lambda: jax.block_until_ready(product(square))  # noqa: E731
    else:
        import torch

        square = torch.ones(2048, 2048)
        once = lambda: square @ square  # noqa: E731
    once()
    spent = []
    for _ in range(15):
        began = time.perf_counter()
        once()
        spent.append(time.perf_counter() - began)
    return 2 * 2048**3 / sorted(spent)[len(spent) // 2]


def main() -> None:
    """Answers until its input ends."""
    trainer, inputs, *directory = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print stays out of the way
    with np.load(inputs, allow_pickle=False) as file:
        given = {name: file[name] for name in file.files}
    given["shape"] = json.loads(str(given["shape"]))
    step, positions, version = TRAINERS[trainer](given, *directory or [""])
    about = {"version": version, "positions": positions}
    about["rate"] = matrix_rate("jax" if trainer == "specjax" else "torch")
    answer(step, about, answers)


def answer(step: Step, about: dict[str, Any], answers: Any) -> None:
    """Says that it is ready, then takes a step for every line of the input, until that ends.

    Args:
      step: what is timed; its first calls are not.
      about: what is said at the beginning.
      answers: the file to write to.
    """
    for _ in range(3):  # compilation, and the first touch of all memory
        step()
    status = pathlib.Path("/proc/self/status")
    with contextlib.suppress(OSError):  # the peak counts from now on, where the system can
        status.with_name("clear_refs").write_text("5")
    print(json.dumps(about), file=answers, flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = step()
        seconds, peak = time.perf_counter() - began, 0
        with contextlib.suppress(OSError):
            peak = 1024 * int(next(x for x in status.read_text().splitlines() if "VmHWM" in x).split()[1])
        print(json.dumps({"seconds": seconds, "bytes": peak, "loss": loss}), file=answers, flush=True)


if __name__ == "__main__":
    main()
