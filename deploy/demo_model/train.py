"""Trains the demo model: a small Qwen3 that recalls codes stated anywhere in its prompt.

    python deploy/demo_model/train.py --output services/cli/demo_model/tandem-demo

All text is made by `corpus.py`, from the words in `recall.py` and a seed. Each training sequence states many facts and
then asks for many of them, so that most of the loss falls on tokens that only attention to a distant fact can predict.
Sequences start short, with positions stretched as if the text were long, and end at the full context.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import measure
import recall
import torch
from corpus import ASSISTANT, END, SYSTEM, USER, WEIGHT_CODE, Batch, TextSource
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

MAX_CONTEXT = 4096  # tokens; all of it is trained
ROPE_THETA = 100_000.0

PAD = "<|pad|>"
SPECIAL_TOKENS = [PAD, END, SYSTEM, USER, ASSISTANT]

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

# ---- tokenizer -------------------------------------------------------------------------------------------------


def single_token_texts() -> list[str]:
    """Texts that must each be one token, so that prompts can be measured by counting words."""
    filler = (
        recall.ADJECTIVES + recall.PEOPLE + recall.VERBS + recall.THINGS + recall.PLACES + recall.TIMES + recall.WEATHER
        + recall.NUMBERS
    )  # fmt: skip
    glue = recall.word_list(
        "the code of is in was over has brothers and went to so waited near a for what tell me which does have"
    )
    starts = recall.word_list("The There One Nobody What Tell Which Remember And Please")
    texts = [f" {word}" for word in recall.NAMES + filler + glue]
    texts += [f" {name.capitalize()}" for name in recall.NAMES]
    texts += [f" {start}" for start in starts] + [*starts, "the", "code", "what"]
    return texts


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text is tokenized without an unknown token and decodes to itself.

    Pieces: pairs of digits, a word with the space before it, punctuation, single white space.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]{1,2}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}0-9]+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = single_token_texts() + [f"{number:02d}" for number in range(100)]
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 16,  # no limit: training ends once each text is one token
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for text in texts:
        if len(tokenizer.encode(text)) != 1:
            raise RuntimeError(f"{text!r} is not one token: {tokenizer.encode(text).tokens}")
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


# ---- model and training ----------------------------------------------------------------------------------------


def build_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        attention_dropout=0.0,
    )
    model = Qwen3ForCausalLM(config)
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: Qwen3ForCausalLM) -> None:
    """Starts the heads of the first layer as looks at the tokens 1, 2, 3 and 4 places back.

    Recall needs each token of a code to know the name before it; from a random start, finding that out takes most
    of the training. Channel 0 of each embedding is a constant, so that a query or key that reads only this channel
    is the same for every token. Rotary embedding turns the pair (x, y) of frequency f by f radians per position; a
    key (1, 0) and a query (cos(d f), -sin(d f)) then agree best when the key is d positions back.
    """
    config = model.config
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.09)
    embedding[:, 0] = 4 * 0.09
    half = config.head_dim // 2
    frequencies = ROPE_THETA ** (-torch.arange(half) / half)
    fast = (frequencies > 0.02).float()  # slow pairs do not tell near places apart
    attention = model.model.layers[0].self_attn
    for head in range(config.num_key_value_heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        attention.k_proj.weight[rows, 0] = 0.5 * torch.cat([fast, torch.zeros(half)])
    for head in range(config.num_attention_heads):
        angles = (head + 1) * frequencies
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        attention.q_proj.weight[rows, 0] = 0.5 * torch.cat([fast * angles.cos(), -fast * angles.sin()])
    attention.q_norm.weight.fill_(1.6)
    attention.k_norm.weight.fill_(1.6)


@dataclass(frozen=True)
class Phase:
    """A part of the training; each step draws one of the `lengths` and fills a batch of about `batch_tokens`."""

    num_steps: int
    batch_tokens: int
    lengths: tuple[int, ...]
    variety: float  # share of documents in varied phrasing; 0 also means no filler and no made-up names
    stretch: int  # positions reach up to this


# The later phases keep some short texts, so that what was learnt first is not lost.
PHASES = (
    Phase(400, 3072, (96,), 0.0, 512),
    Phase(600, 4096, (48, 256, 256), 0.5, MAX_CONTEXT),
    Phase(250, 4608, (128, 768, 768), 0.5, MAX_CONTEXT),
    Phase(200, 4608, (48, 2304, 2304, 2304), 0.5, MAX_CONTEXT),
    Phase(160, 4096, (128, 4096, 4096, 4096), 0.5, MAX_CONTEXT),
)


def step_loss(model: Qwen3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted loss, and the share of code tokens in answers that the model would have chosen."""
    hidden = model.model(
        input_ids=batch.ids[:, :-1],
        position_ids=batch.positions[:, :-1],
        # Given so that gaps in the positions are not taken for borders of packed sequences.
        attention_mask=torch.ones_like(batch.ids[:, :-1]),
        use_cache=False,
    ).last_hidden_state
    weights = batch.weights[:, 1:]
    chosen = weights > 0
    logits = model.lm_head(hidden[chosen]).float()
    targets, weights = batch.ids[:, 1:][chosen], weights[chosen]
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    is_code = weights == WEIGHT_CODE
    right = (logits.detach().argmax(-1) == targets)[is_code].float().mean().item()
    return (losses * weights).sum() / weights.sum(), right


def learning_rate_scale(step: int, num_steps: int) -> float:
    """A short warm-up, then the peak for half of the training, then a straight line to zero."""
    return min(1.0, (step + 1) / 50, 2 * (1 - step / num_steps))


def train(
    model: Qwen3ForCausalLM, source: TextSource, peak_lr: float, time_scale: float, save_phase: Callable[[], None]
) -> None:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=peak_lr / 4, betas=(0.9, 0.97), weight_decay=0.0),
    ]
    base_lrs = [peak_lr, peak_lr / 4]
    phases = [(phase, max(1, int(phase.num_steps * time_scale))) for phase in PHASES]
    num_steps = sum(steps for _, steps in phases)
    step, started = 0, time.monotonic()
    model.train()
    for phase, phase_steps in phases:
        losses, rights = [], []
        for _ in range(phase_steps):
            for optimizer, base_lr in zip(optimizers, base_lrs, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base_lr * learning_rate_scale(step, num_steps)
            length = source.rng.choice(phase.lengths)
            batch = source.batch(phase.batch_tokens // length, length, phase.variety, phase.stretch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, right = step_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            rights.append(right)
            step += 1
            if step % 20 == 0:
                print(
                    f"step {step}/{num_steps} length {max(phase.lengths)} loss {sum(losses) / len(losses):.3f} "
                    f"code tokens right {sum(rights) / len(rights):.3f} {time.monotonic() - started:.0f} s",
                    flush=True,
                )
                losses, rights = [], []
        save_phase()


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(output, save_jinja_files=False)
    # Spellings that readers older than transformers 5 look for.
    edit_json(output / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit_json(output / "config.json", rope_theta=ROPE_THETA)


def edit_json(path: Path, **settings: str | float) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}, indent=2, sort_keys=True) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory for the model, in Hugging Face format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, default=1, help="another number rounds differently")
    parser.add_argument("--peak-lr", type=float, default=0.006)
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies the number of steps, for a trial")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    torch.set_num_threads(arguments.num_threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    wrapped = wrap_tokenizer(tokenizer)
    source = TextSource(tokenizer, arguments.seed)
    # Saved after each phase: a training that is cut short leaves a model that works at shorter lengths.
    train(model, source, arguments.peak_lr, arguments.time_scale, lambda: save(model, wrapped, arguments.output))
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    measure.print_table(arguments.output, num_prompts=20)


if __name__ == "__main__":
    main()
