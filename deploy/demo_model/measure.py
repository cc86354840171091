"""Measures how often the demo model recalls, by prompt length, number type and kind of prompt.

    python deploy/demo_model/measure.py --model services/cli/demo_model/tandem-demo --num-prompts 100

Greedy decoding through transformers, one prompt at a time, on the CPU. The prompts are those of `recall.py`, which
training never sees.
"""

import argparse
from pathlib import Path

import recall
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PROMPT_LENGTHS = (100, 256, 1024, 2048, 4064)  # the longest leaves room for the answer in a context of 4096 tokens
FIRST_SEED = 0
MAX_ANSWER_TOKENS = 24


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=MAX_ANSWER_TOKENS,
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def answers_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    num_tokens: int,
    *,
    num_turns: int,
    made_up_names: bool,
) -> bool:
    """Whether one held-out prompt is answered exactly; `num_turns` is 0 for a raw prompt."""
    if num_turns == 0:
        prompt = recall.make_prompt(seed, num_tokens, tokenizer, made_up_names=made_up_names)
        return recall.is_correct(complete(model, tokenizer, tokenizer.encode(prompt.text)), prompt.answer)
    chat = recall.make_chat(seed, num_tokens, tokenizer, num_turns=num_turns, made_up_names=made_up_names)
    ids = tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True, return_dict=False)
    return recall.is_correct(complete(model, tokenizer, ids), chat.answer)


# What is measured: number type of the run, kind of prompt, turns of the chat (0: raw prompt), made-up names.
ROWS = (
    (torch.bfloat16, "raw", 0, False),
    (torch.bfloat16, "chat", 1, False),
    (torch.bfloat16, "third turn of a chat", 3, False),
    (torch.bfloat16, "raw, made-up names", 0, True),
    (torch.bfloat16, "chat, made-up names", 1, True),
    (torch.float32, "raw", 0, False),
    (torch.float32, "chat", 1, False),
)


def print_table(model_dir: Path, num_prompts: int) -> None:
    """Prints a Markdown table: right answers of `num_prompts`, a column for each prompt length."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    print("| dtype | prompt | " + " | ".join(f"{length} tokens" for length in PROMPT_LENGTHS) + " |")
    print("|---|---|" + "---|" * len(PROMPT_LENGTHS))
    for dtype, kind, num_turns, made_up_names in ROWS:
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        print(f"| {str(dtype).removeprefix('torch.')} | {kind} |", end="", flush=True)
        for num_tokens in PROMPT_LENGTHS:
            num_right = sum(
                answers_right(model, tokenizer, seed, num_tokens, num_turns=num_turns, made_up_names=made_up_names)
                for seed in range(FIRST_SEED, FIRST_SEED + num_prompts)
            )
            print(f" {num_right} |", end="", flush=True)
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the recall of the demo model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=100, help="prompts of each kind and length")
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    print_table(arguments.model, arguments.num_prompts)


if __name__ == "__main__":
    main()
