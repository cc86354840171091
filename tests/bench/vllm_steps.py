"""vLLM's side of `make bench-peer`, run in vLLM's own environment: orders come on stdin, answers go to --answers.

Both are lines of JSON; an order names one of `Steps`' public methods and its arguments. End of input ends the process.

The engine takes real requests through its scheduler. Two times are taken of each step: `model_s`, in which the runner
builds the attention metadata, runs the layers and computes the logits; and `step_s`, all of `LLMEngine.step`: schedule,
prepare the inputs, the model, sample, hand out. While a decode step's contexts are made, the layers are skipped: the
cache holds random numbers from the start, and what lies in it does not change the time.

Where ATEN_CPU_CAPABILITY keeps torch to AVX2, vLLM loads its kernels for AVX2 too: it asks torch for the processor's
own features, which that variable does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":  # before vLLM's import, which loads its kernels
    torch.cpu._is_avx512_supported = torch.cpu._is_avx512_bf16_supported = lambda: False

from vllm import EngineArgs, LLMEngine, SamplingParams

_BLOCK_SIZE = 128  # what vLLM takes on a CPU where nobody chooses


class Steps:
    """The engine, and the seconds of its model in the step that runs."""

    def __init__(self, limits: argparse.Namespace) -> None:
        self._limits = limits
        grown = limits.num_sequences * -(-(limits.num_steps + _BLOCK_SIZE) // _BLOCK_SIZE)  # blocks
        arguments = EngineArgs(
            model=limits.model,
            dtype=limits.dtype,
            enforce_eager=True,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            enable_prefix_caching=False,
            enable_chunked_prefill=True,
            block_size=_BLOCK_SIZE,
            num_gpu_blocks_override=-(-limits.num_tokens // _BLOCK_SIZE) + grown + 1,  # and one that stands for none
            kv_cache_memory_bytes=1 << 30,  # overridden by the number of blocks; without it a warm-up run is made
            max_model_len=limits.longest + limits.num_steps,
            max_num_seqs=limits.num_sequences,
            max_num_batched_tokens=max(limits.num_tokens, limits.chunk),  # for `decode`; else the scheduler is limited
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        core: Any = self._engine.engine_core.engine_core
        self._scheduler = core.scheduler
        self._vocab_size = self._engine.model_config.get_vocab_size()
        self._requests: list[str] = []
        self._num_requests = 0
        self._model_s = 0.0
        self._skip_layers = False
        self._logits: list[torch.Tensor] = []
        self._hook(core.model_executor.driver_worker.worker.model_runner)

    def decode(self, num_sequences: int, context: int) -> dict[str, object]:
        """Make ready: the next `step` is a decode step of so many sequences with contexts of so many tokens."""
        self._clear()
        self._scheduler.max_num_scheduled_tokens = num_sequences * context
        generator = random.Random(context)
        for _ in range(num_sequences):
            self._add(
                [generator.randrange(3, self._vocab_size) for _ in range(context - 1)], 1 + self._limits.num_steps
            )
        self._skip_layers = True
        self._engine.step()
        self._skip_layers = False
        return {}

    def step(self) -> dict[str, object]:
        """Every sequence's next token."""
        self._model_s = 0.0
        started = time.perf_counter()
        outputs = self._engine.step()
        step_s = time.perf_counter() - started
        if len(outputs) != len(self._requests):
            raise RuntimeError(f"{len(outputs)} of {len(self._requests)} sequences took part in the step")
        return {"model_s": self._model_s, "step_s": step_s}

    def prefill(self, token_ids: list[int]) -> dict[str, object]:
        """A prompt alone, in as many steps as it takes."""
        self._clear()
        self._scheduler.max_num_scheduled_tokens = self._limits.chunk
        self._model_s = 0.0
        self._add(token_ids, 1)
        started = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return {"model_s": self._model_s, "step_s": time.perf_counter() - started}

    def logits(self, token_ids: list[int]) -> dict[str, object]:
        """Of the prompt's last token and, after a decode step, of the token chosen then, which is named too."""
        self._clear()
        self._scheduler.max_num_scheduled_tokens = self._limits.chunk
        self._add(token_ids, 2)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        last, after = (logits.float().flatten() for logits in self._logits[-2:])
        return {"token_id": int(last.argmax()), "logits": [last.tolist(), after.tolist()]}

    def _hook(self, runner: Any) -> None:
        for cache in runner.kv_caches:
            cache.copy_(torch.randn(cache.shape[1:]))
        runner._build_attention_metadata = self._timed(runner._build_attention_metadata)
        layers = self._timed(runner._model_forward)
        compute_logits = self._timed(runner.model.compute_logits)
        hidden = torch.zeros(1, self._engine.model_config.get_hidden_size(), dtype=runner.dtype)

        def run_layers(input_ids: torch.Tensor, **arguments: Any) -> Any:
            if self._skip_layers:
                return hidden.expand(len(input_ids), -1)
            return layers(input_ids=input_ids, **arguments)

        def keep_logits(*arguments: Any) -> Any:
            logits = compute_logits(*arguments)
            self._logits = [*self._logits[-1:], logits]
            return logits

        runner._model_forward = run_layers
        runner.model.compute_logits = keep_logits

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            self._model_s += time.perf_counter() - started
            return result

        return run

    def _clear(self) -> None:
        self._engine.abort_request(self._requests)
        self._requests = []
        if self._engine.has_unfinished_requests():
            raise RuntimeError("requests are left from the run before")

    def _add(self, token_ids: list[int], max_tokens: int) -> None:
        self._num_requests += 1
        name = str(self._num_requests)
        parameters = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": token_ids}, parameters)
        self._requests.append(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True, help="of weights, activations and cache")
    parser.add_argument("--answers", type=int, required=True, help="a file descriptor")
    parser.add_argument("--chunk", type=int, required=True, help="tokens of a prefill step")
    parser.add_argument("--num-sequences", type=int, required=True, help="the most of them in a step")
    parser.add_argument("--num-tokens", type=int, required=True, help="the most that lie in the cache at once")
    parser.add_argument("--longest", type=int, required=True, help="tokens of the longest context")
    parser.add_argument("--num-steps", type=int, required=True, help="decode steps of a batch")
    arguments = parser.parse_args()
    with open(arguments.answers, "w", encoding="utf-8") as answers:

        def answer(content: dict[str, object]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        steps = Steps(arguments)
        answer({})
        for line in sys.stdin:
            order = json.loads(line)
            answer(getattr(steps, order.pop("order"))(**order))


if __name__ == "__main__":
    main()
