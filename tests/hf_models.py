"""Tiny random models in HuggingFace format, and what `transformers` says of them: the ground truth of every suite.

    path = write_model(tmp_path / "model", "llama3", seed=1)
    expected = reference_greedy(path, prompts, max_new_tokens=16, ignore_eos=True)

The weights are drawn so that mistakes show: attention is peaked, so the output depends on particular keys at
particular positions; logits lie far apart, so that greedy tokens survive rounding differences of 1e-4.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # of models so small further threads only wait, for processors that others need

VOCAB_SIZE = 512
PAD_TOKEN_ID, IM_START_TOKEN_ID, IM_END_TOKEN_ID = 0, 1, 2
EOS_TOKEN_IDS = (IM_END_TOKEN_ID, PAD_TOKEN_ID)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": IM_END_TOKEN_ID,
    "pad_token_id": PAD_TOKEN_ID,
    "tie_word_embeddings": False,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}

# family: (model_type, what differs from _BASE)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": (
        "llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    ),
    "llama3": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 64, "head_dim": 32}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-6}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "yarn": ("qwen2", {"rope_parameters": _YARN_ROPE}),
    "linear_rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}),
}

FAMILIES = tuple(_FAMILIES)
"""Those that the native engine computes."""

_WIDE: dict[str, Any] = {"head_dim": 32}  # vLLM computes no narrower heads on a CPU
_WINDOWED: dict[str, Any] = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-6,  # as theirs have, and as transformers has for the latent's norm whatever is said
}
_FAMILIES |= {
    "gemma2": ("gemma2", {**_WIDE, **_WINDOWED, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**_WIDE, **_WINDOWED, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "phi": ("phi", {"hidden_size": 128, "num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"hidden_size": 128}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_WIDE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "mixtral": ("mixtral", {**_WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False}),
    "deepseek_v3": (
        "deepseek_v3",
        {**_LATENT, "q_lora_rank": 48, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "gpt_neox": (
        "gpt_neox",
        # It has no such key, and vLLM believes it.
        {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "rotary_pct": 1.0},
    ),
    "olmo2": ("olmo2", {"hidden_size": 128}),
}
FOREIGN_FAMILIES = tuple(_FAMILIES)[len(FAMILIES) :]
"""Those that it does not."""
_FAMILIES |= {
    "mistral_window": ("mistral", {**_WIDE, "sliding_window": 64}),
    "llama_wide": ("llama", {**_WIDE, "rope_parameters": _LLAMA3_ROPE}),
    "qwen2_wide": ("qwen2", {"hidden_size": 128}),
    "mistral_full": ("mistral", {**_WIDE, "sliding_window": None}),
}
_LORA_ALPHA = 8


def write_model(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a random model of `family` (see `FAMILIES`), its tokenizer and generation settings. Returns `directory`.

    The same arguments give the same bytes. `max_shard_size` ("50KB") makes several files with an index.
    """
    model_type, settings = _FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**_BASE, **settings, **config_overrides})
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights, which are overwritten
        model = transformers.AutoModelForCausalLM.from_config(config)
    _draw_weights(model, seed, 0.0 if model_type.startswith("gemma") else 1.0)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=list(EOS_TOKEN_IDS), pad_token_id=PAD_TOKEN_ID, do_sample=False
    )
    model = model.to(getattr(torch, dtype))
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, **shards)
    write_tokenizer(directory)
    return directory


# What no engine serves across workers: configurations alone.
_NARROW = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {**_NARROW, "state_size": 16}),
    "bamba": ("bamba", {**_BASE, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_state": 16}),
    "bart": ("bart", {"vocab_size": VOCAB_SIZE, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1}),
    "qwen2_vl": ("qwen2_vl", {"text_config": _BASE}),
    "bert": ("bert", {**_NARROW, "num_attention_heads": 2, "intermediate_size": 128}),
}
REFUSED_CONFIGS = tuple(_CONFIGS)
"""By name, for `write_config`."""
_ARCHITECTURES = {
    "bart": "BartForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "bert": "BertForMaskedLM",
}


def write_config(directory: Path, name: str) -> Path:
    """Write config.json of a family, or of a model that is refused; its tokenizer, no weights. Returns `directory`."""
    model_type, settings = _CONFIGS[name] if name in _CONFIGS else (_FAMILIES[name][0], _BASE | _FAMILIES[name][1])
    config = transformers.AutoConfig.for_model(model_type, **settings)
    config.architectures = [_ARCHITECTURES.get(name) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    config.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def _draw_weights(model: torch.nn.Module, seed: int, norm_mean: float = 1.0) -> None:
    """`norm_mean` 0: of a model whose norms multiply by one more than their weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(mean + std * torch.randn(parameter.shape, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1]
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                normal(parameter, 0.2, mean=norm_mean + 0.5)
            elif name.endswith("norm.weight"):
                normal(parameter, 0.1, mean=norm_mean)
            elif name.endswith(".bias"):
                normal(parameter, 0.3)
            elif name.endswith(("q_proj.weight", "q_b_proj.weight", "k_proj.weight", "kv_a_proj_with_mqa.weight")):
                normal(parameter, 1.5 * fan_in**-0.5)
            elif name.endswith(("lm_head.weight", "embed_tokens.weight", "embed_in.weight", "embed_out.weight")):
                normal(parameter, 5.0 * fan_in**-0.5)
            else:
                normal(parameter, fan_in**-0.5)


def write_adapter(directory: Path, model: Path, *, seed: int, rank: int = 8) -> Path:
    """Write a random LoRA adapter of `model` as PEFT does, of all projections; it changes what the model says."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            outputs, inputs = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
            weights[f"{stem}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator) * rank**-0.5
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-3] for name in weights})
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": _LORA_ALPHA, "target_modules": modules, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    return directory


def merge_adapter(directory: Path, model: Path, adapter: Path) -> Path:
    """Write the model that says by itself what `model` says with the adapter."""
    shutil.copytree(model, directory)
    weights, added = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in weights:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in added:
            factors = added[f"{stem}.lora_B.weight"], added[f"{stem}.lora_A.weight"]
            weights[name] += _LORA_ALPHA / len(factors[1]) * (factors[0] @ factors[1])
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE tokenizer of `VOCAB_SIZE` tokens (any text round-trips) with a ChatML template."""
    _tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 2048,
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS[IM_END_TOKEN_ID],
        "pad_token": SPECIAL_TOKENS[PAD_TOKEN_ID],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


@functools.cache
def _tokenizer() -> Tokenizer:
    """Train on text made up of syllables: enough distinct words for all the merges."""
    onsets, vowels, codas = "bdfgklmnprstvz", "aeiou", ["", "n", "r", "st"]
    syllables = [onset + vowel + coda for onset in onsets for vowel in vowels for coda in codas]
    words = [syllables[i % len(syllables)] + syllables[i * 7 % len(syllables)] for i in range(2000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Return one prompt of random ordinary tokens per length."""
    generator = torch.Generator().manual_seed(seed)
    first = len(SPECIAL_TOKENS)
    return [torch.randint(first, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@functools.lru_cache(maxsize=16)
def reference_model(directory: Path, dtype: str = "float32") -> Any:
    """Return the `transformers` model in `directory`, with plain ("eager") attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def reference_logits(directory: Path, token_ids: Sequence[int], dtype: str = "float32") -> torch.Tensor:
    """Return float32 logits `[len(token_ids), vocab_size]` of one pass over the whole sequence."""
    logits: torch.Tensor = reference_model(directory, dtype)(torch.tensor([token_ids])).logits[0].float()
    return logits


@torch.inference_mode()
def reference_greedy(
    directory: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, ignore_eos: bool = False
) -> list[list[int]]:
    """Return what `transformers.generate` appends greedily to each prompt: token ids, the end-of-sequence one too."""
    model = reference_model(directory)
    settings = transformers.GenerationConfig.from_pretrained(directory)
    settings.update(do_sample=False, max_new_tokens=max_new_tokens)
    if ignore_eos:
        settings.eos_token_id = None
    model.generation_config = settings  # what is passed to generate() is merged with this, so None would not count
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    outputs: list[list[int]] = [[] for _ in prompts]
    for length, indices in by_length.items():  # those of one length at once, which no padding disturbs
        ids = torch.tensor([prompts[index] for index in indices])
        generated = model.generate(ids, attention_mask=torch.ones_like(ids))[:, length:].tolist()
        for index, tokens in zip(indices, generated, strict=True):
            ends = [] if ignore_eos else [at + 1 for at, token in enumerate(tokens) if token in EOS_TOKEN_IDS]
            outputs[index] = tokens[: min(ends, default=None)]
    return outputs
