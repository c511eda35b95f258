"""What a target's `config.json` says is obeyed or refused by name."""

import math

import pytest
from golden_families import GOLDEN

from ppow_jax.errors import UserError
from ppow_jax.targets import families
from ppow_jax.targets.harmless import harmless

BASE = {name: GOLDEN[name]["config"] for name in GOLDEN}
LAYERS = 7


def shape(config: dict, tied: bool = False):
    return families.target_config(config, tied, "float32", "m/config.json")


def refused(config: dict, *said: str) -> None:
    with pytest.raises(UserError) as e:
        shape(config)
    assert str(e.value).startswith("m/config.json: ") and "\n" not in str(e.value)
    for words in said:
        assert words in str(e.value), str(e.value)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
VICUNA = {
    "_name_or_path": "vicuna-7b-v1.5",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "transformers_version": "4.31.0",
    "vocab_size": 32000,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
MISTRAL = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
GEMMA_TEXT = {  # as its 4B's part about text, which names what is not as in its class
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": GEMMA_TEXT,
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27},
}
LLAVA = {
    "image_token_index": 32000,
    "model_type": "llava",
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 1024},
    "vision_feature_layer": -2,
    "vocab_size": 32064,
}  # fmt: skip
SMOL = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4f16"}}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (LLAMA, dict(head_size=128, kv_heads=8, rope_theta=5e5, tied_head=False, taps=(2, 16, 29), spans=())),
        (LLAMA | SMOL | {"unsloth_fixed": True, "head_dim": 128, "pruned_heads": {}}, dict(head_size=128)),
        (VICUNA, dict(kv_heads=32, rope_theta=1e4, rope_divisors=(), context=4096)),
        (VICUNA | {"do_sample": True, "temperature": 0.9, "_attn_implementation_autoset": True}, {}),
        (QWEN2, dict(attention_bias=True, out_bias=False, spans=(), rope_theta=1e4)),
        (MISTRAL, dict(spans=(4096,) * 32)),
        (
            MISTRAL | {"sliding_window": None, "head_dim": 160, "rope_theta": 1e6},
            dict(spans=(), head_size=160),
        ),
        (GEMMA, dict(heads=8, kv_heads=4, head_size=256, vocab_size=262208, context=131072, tied_head=True)),
        (GEMMA, dict(rope_theta=1e6, local_theta=1e4, rope_divisors=(8.0,) * 128, query_scale=1 / 16)),
        (LLAVA, dict(width=4096, mlp_hidden=11008, layers=32, kv_heads=32, vocab_size=32064, context=4096)),
    ],
)
def test_configs_as_models_have_them(config, want):
    found = vars(shape(config))
    assert {key: found[key] for key in want} == want


def test_what_a_missing_key_means_is_what_transformers_takes_it_to_mean():
    without = lambda config, *keys: {k: v for k, v in config.items() if k not in keys}  # noqa: E731
    assert shape(without(MISTRAL, "sliding_window")).spans == (4096,) * 32
    used = {"use_sliding_window": True, "num_hidden_layers": 30}
    assert (
        shape(without(QWEN2, "sliding_window", "max_window_layers") | used).spans == (0,) * 28 + (4096,) * 2
    )
    gemma = without(BASE["gemma3"], "tie_word_embeddings", "rope_parameters", "layer_types", "sliding_window")
    found = shape(gemma)
    assert found.tied_head and (found.rope_theta, found.local_theta) == (1e6, 1e4)
    assert found.spans == (4096,) * 5 + (0, 4096)
    assert shape(without(BASE["qwen3"], "head_dim")).head_size == 128
    assert shape(without(VICUNA, "rms_norm_eps") | {"rms_norm_eps": 0}).norm_epsilon == 0
    for tied in (True, False):
        assert shape(without(LLAMA, "tie_word_embeddings"), tied).tied_head == tied
    for key in ("hidden_size", "num_hidden_layers", "rms_norm_eps", "max_position_embeddings", "vocab_size"):
        refused(without(LLAMA, key), f"found no {key!r}, which a llama model has")


def kinds(*changes: tuple[int, str]) -> list[str]:
    found = ["full_attention"] * LAYERS
    for at, kind in changes:
        found[at] = kind
    return found


REFUSED = {
    "linear attention": ("qwen3", dict(layer_types=["linear_attention"] * 7), "'linear_attention' in"),
    "one chunked layer": ("qwen3", dict(layer_types=kinds((6, "chunked_attention"))), "'chunked_attention'"),
    "too few kinds": ("qwen3", dict(layer_types=["full_attention"]), "found 1 layer_types, expected 7"),
    "too many kinds": ("gemma3", dict(layer_types=["full_attention"] * 8), "found 8 layer_types, expected 7"),
    "no list of kinds": ("qwen3", dict(layer_types="full_attention"), "expected a list of texts"),
    "numbers as kinds": ("qwen3", dict(layer_types=[0] * 7), "layer_types with 0 in it"),
    "kinds of a llama": ("llama2", dict(layer_types=kinds((1, "conv"))), "'conv' in layer_types"),
    "a window that is off": (
        "qwen3", dict(layer_types=kinds((1, "sliding_attention")), sliding_window=8), "no sliding_window"),
    "a window of a llama": ("llama2", dict(sliding_window=8), "sliding_window 8, expected null"),
    "mixed layers": ("mistral", dict(layer_types=kinds((0, "sliding_attention"))), "of one kind"),
    "a window of 0": ("mistral", dict(sliding_window=0), "sliding_window 0, expected a whole number from 1"),
    "a window as text": ("mistral", dict(sliding_window="8"), "sliding_window '8'"),
    "no window of a gemma": ("gemma3", dict(sliding_window=None), "sliding_window None"),
    "biases of a mistral": ("mistral", dict(attention_bias=True), "attention_bias True, expected false"),
    "no biases of a qwen2": ("qwen2", dict(attention_bias=False), "attention_bias False, expected true"),
    "biases as a number": ("llama2", dict(attention_bias=1), "attention_bias 1, expected true or false"),
    "biases of the mlp": ("llama2", dict(mlp_bias=True), "mlp_bias True, expected false"),
    "biases of queries alone": ("llama2", dict(qkv_bias=True), "qkv_bias True"),
    "soft caps of scores": ("llama2", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0"),
    "soft caps of logits": ("gemma3", dict(final_logit_softcapping=30), "final_logit_softcapping 30"),
    "both ways": ("llama2", dict(is_causal=False), "is_causal False, expected true"),
    "both ways, gemma": ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    "experts": ("llama2", dict(num_local_experts=8), "num_local_experts 8", "remove it"),
    "a shared expert": ("qwen2", dict(shared_expert_intermediate_size=64), "shared_expert_intermediate_size"),
    "further tokens": ("qwen3", dict(num_nextn_predict_layers=1), "num_nextn_predict_layers 1"),
    "layers without positions": ("llama2", dict(no_rope_layers=[1, 1, 0] * 2), "no_rope_layers [1, 1, 0"),
    "other positions": ("llama2", dict(position_embedding_type="alibi"), "position_embedding_type 'alibi'"),
    "a part of a head": ("llama2", dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "interleaved": ("llama2", dict(rope_interleaved=True), "rope_interleaved True"),
    "granite's factors": ("llama2", dict(residual_multiplier=0.22), "residual_multiplier 0.22"),
    "code of its own": ("qwen2", dict(auto_map={"AutoModel": "m.M"}), "auto_map", "code of the model"),
    "an activation": ("llama2", dict(hidden_act="gelu"), "hidden_act 'gelu', expected one of silu, swish"),
    "gemma's activation": ("gemma3", dict(hidden_activation="gelu"), "hidden_activation 'gelu'"),
    "two activations": ("gemma3", dict(hidden_act="silu"), "hidden_act 'silu'"),
    "a scaled window": (
        "gemma3",
        dict(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 8.0}}),
        "rope_parameters.sliding_attention.rope_type 'linear'"),
    "kv heads": ("llama2", dict(num_key_value_heads=3), "num_key_value_heads 3, expected a divisor of", "4"),
    "more kv heads than heads": ("llama2", dict(num_key_value_heads=8), "num_key_value_heads 8"),
    "an odd head": ("llama2", dict(head_dim=7), "head_dim 7, expected an even number"),
    "heads that do not divide": (
        "llama2", dict(head_dim=None, num_attention_heads=5, num_key_value_heads=5), "num_attention_heads 5"),
    "a text as width": ("llama2", dict(hidden_size="32"), "hidden_size '32', expected a whole number"),
    "a list as layers": ("llama2", dict(num_hidden_layers=[7]), "num_hidden_layers [7]"),
    "truth as heads": ("llama2", dict(num_attention_heads=True), "num_attention_heads True"),
    "a negative vocabulary": ("llama2", dict(vocab_size=-96), "vocab_size -96"),
    "no number as epsilon": ("llama2", dict(rms_norm_eps=math.nan), "rms_norm_eps nan"),
    "endless context": ("llama2", dict(max_position_embeddings=math.inf), "max_position_embeddings inf"),
    "very many layers": ("llama2", dict(num_hidden_layers=10**9), "num_hidden_layers 1000000000, expected"),
    "a huge head": ("llama2", dict(head_dim=2**30), "head_dim 1073741824"),
    "beyond all numbers": ("llama2", dict(intermediate_size=10**30), "intermediate_size 1000000"),
    "half a neuron": ("llama2", dict(intermediate_size=48.5), "intermediate_size 48.5"),
    "tied by a text": ("llama2", dict(tie_word_embeddings="yes"), "tie_word_embeddings 'yes'"),
    "a drafter": ("llama2", dict(draft_vocab_size=24), "draft_vocab_size 24, expected a target's config"),
    "a kind that is none": ("llama2", dict(model_type=["llama"]), "model_type ['llama']"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_obeyed_is_refused_by_name(name):
    base, changes, *said = REFUSED[name]
    refused(BASE[base] | changes, *said)


@pytest.mark.parametrize("name", REFUSED)
def test_wherever_it_is_said(name):
    """In the part about text of a model that sees pictures."""
    base, changes, *said = REFUSED[name]
    with pytest.raises(UserError) as e:
        shape({"model_type": "seeing", "text_config": BASE[base] | changes})
    for words in said:
        assert "text_config." in str(e.value) and words in str(e.value).replace("text_config.", "")


def test_what_is_said_outside_the_part_about_text():
    seeing = {"model_type": "seeing", "vision_config": {"num_experts": 4}, "mm_tokens": 256}
    text = BASE["llama2"]
    assert shape(seeing | {"text_config": text, "hidden_size": 32, "vocab_size": 96}) == shape(text)
    untied = {k: v for k, v in text.items() if k != "tie_word_embeddings"}
    assert shape(seeing | {"text_config": untied, "tie_word_embeddings": True}).tied_head
    refused(
        seeing | {"text_config": text, "tie_word_embeddings": True}, "tie_word_embeddings True, expected that"
    )
    refused(
        seeing | {"text_config": text, "hidden_size": 64}, "hidden_size 64, expected that of text_config, 32"
    )
    refused(seeing | {"text_config": text, "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0")
    refused(seeing | {"text_config": "llama"}, "text_config 'llama', expected a group of keys")
    refused(seeing | {"text_config": {}}, "model_type None, expected one of llama")


def test_windows_that_reach_over_the_whole_context_or_are_not_used_are_none():
    plain = shape(BASE["llama2"])
    assert shape(BASE["llama2"] | {"sliding_window": 64}) == plain
    assert shape(BASE["llama2"] | {"sliding_window": 8, "use_sliding_window": False}) == plain
    assert shape(BASE["llama2"] | {"layer_types": kinds()}) == plain
    assert shape(BASE["qwen3"] | {"sliding_window": 8}).spans == ()


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "'bitsandbytes', 8 bits",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config of the scheme 'gptq'",
        ),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "x"}},
            "compressed-tensors",
        ),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "'fp8'"),
        ({"quantization_config": {"bits": 2}}, "2 bits"),
        ({"quantization_config": "awq"}, "'awq'"),
        ({"compression_config": {"config_groups": {}}}, "compression_config of {'config_groups'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization of 4 bits"),
    ],
)
def test_quantised_weights_are_refused_by_the_name_of_their_scheme(scheme, said):
    for config in (LLAMA | scheme, GEMMA | scheme, GEMMA | {"text_config": GEMMA_TEXT | scheme}):
        refused(config, said, "expected weights in float32")
    assert shape(LLAMA | {"quantization_config": None}) == shape(LLAMA | {"quantization_config": {}})


def test_scalings_of_the_wavelengths_reach_the_shape():
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = shape(QWEN2 | {"rope_scaling": yarn})
    assert found.rope_scale == pytest.approx(0.1 * math.log(4) + 1) and found.context == 131072
    assert found.rope_divisors[0] == 1 and found.rope_divisors[-1] == pytest.approx(4)
    factors = {"short_factor": [1.5] * 64, "long_factor": [8.0] * 64}
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 8192} | factors
    found = shape(LLAMA | {"rope_scaling": longrope})
    assert found.rope_divisors == (1.5,) * 64 and found.context == 8192
    assert found.rope_scale == pytest.approx(math.sqrt(1 + math.log(16) / math.log(8192)))
    same = longrope | {"long_factor": [1.5] * 64}
    assert shape(LLAMA | {"rope_scaling": same}).context == 131072


JUNK = ["x", "", [1], {"a": 1}, True, 0, -1, 3.5, math.nan, math.inf, 10**30]


@pytest.mark.parametrize("name", BASE)
def test_any_value_of_any_key_is_obeyed_or_refused_in_one_line(name):
    rope = BASE[name]["rope_parameters"]
    for key in [*BASE[name], *(f"rope_parameters.{key}" for key in rope)]:
        for value in JUNK:
            _, _, last = key.partition(".")
            changed = {"rope_parameters": rope | {last: value}} if last else {key: value}
            try:
                found = shape(BASE[name] | changed)
            except UserError as e:
                assert key.split(".")[-1] in str(e) and "\n" not in str(e), str(e)
            else:
                assert not harmless(key) or found == shape(BASE[name])
