"""Measures how often the demo model recalls, by prompt length, number type and kind of prompt.

    python deploy/demo_model/measure.py --model deploy/demo_model/tandem-demo --num-prompts 100

Greedy decoding through transformers, one prompt at a time, on the CPU. The prompts are those of `recall.py`, which
training never sees.
"""

import argparse
import time
from pathlib import Path

import recall
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PROMPT_LENGTHS = (64, 256, 1024, 2048, 4064)  # the longest leaves room for the answer in a context of 4096 tokens
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


def print_table(model_dir: Path, num_prompts: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    seeds = range(FIRST_SEED, FIRST_SEED + num_prompts)
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
        for names, made_up_names in (("listed names", False), ("made-up names", True)):
            for kind, num_turns in (("raw", 0), ("chat", 1), ("chat, third turn", 3)):
                for num_tokens in PROMPT_LENGTHS:
                    if num_tokens < 128 and num_turns > 1:
                        continue  # no room for three questions
                    started = time.monotonic()
                    num_right = sum(
                        answers_right(
                            model, tokenizer, seed, num_tokens, num_turns=num_turns, made_up_names=made_up_names
                        )
                        for seed in seeds
                    )
                    took_s = time.monotonic() - started
                    where = f"{str(dtype).removeprefix('torch.')}, {names}, {kind}, {num_tokens} tokens"
                    print(f"{where}: {num_right} of {num_prompts} right ({took_s:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the recall of the demo model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=100, help="prompts of each kind and length")
    parser.add_argument("--num-threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    print_table(arguments.model, arguments.num_prompts)


if __name__ == "__main__":
    main()
