"""Keys of `config.json` that change nothing of what a decoder computes from a text.

Labels, defaults of generation and of training, names of tokens, and what only other programs read. The rest
of the keys are obeyed or refused: see `families`.
"""

import re

_PATTERNS = re.compile(
    r"_.*|.*_token_ids?|.*_token_index|.*_token|.*dropout.*|.*_pdrop|.*_version|.*_implementation"
    r"|(torch_)?dtype|initializer_.*|init_.*|transformers\..*|unsloth.*|.*flash_attn.*"
)
_KEYS = frozenset(
    {
        # names, and what other programs read
        "architectures",
        "cache_implementation",
        "gradient_checkpointing",
        "is_decoder",
        "is_llama_config",
        "model_type",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "prefix",
        "return_dict",
        "tf_legacy_loss",
        "tokenizer_class",
        "torchscript",
        "use_bfloat16",
        "use_cache",
        # how products were cut in training; of windows, which are read where there are any
        "max_window_layers",
        "pretraining_tp",
        # losses and labels of training
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "router_aux_loss_coef",
        "task_specific_params",
        # lengths of training texts
        "max_seq_len",
        "max_seq_length",
        "max_sequence_length",
        "model_max_length",
        "seq_len",
        "seq_length",
        # defaults of generation, as older files have them
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)


def harmless(key: str) -> bool:
    """Whether a key changes no result."""
    return key in _KEYS or _PATTERNS.fullmatch(key) is not None
