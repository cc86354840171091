"""What is added to each of vLLM's workers (`worker_extension_cls`): called over its executor, on the rank itself."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams


class RankExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any

    def tandem_attach(self) -> None:
        """Let the rank's connector reach its model runner."""
        get_kv_transfer_group().runner = self.model_runner

    def tandem_prepare(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        sampling: SamplingParams,
        adapter: LoRARequest | None,
    ) -> None:
        """Make the first model runner know a request as one that was preempted after this output.

        The second takes prompt and output of whatever comes to it.
        """
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        self.model_runner.requests[request_id] = CachedRequestState(
            req_id=request_id,
            prompt_token_ids=prompt_token_ids,
            mm_features=[],
            sampling_params=sampling,
            generator=None,
            block_ids=([],),
            num_computed_tokens=0,
            output_token_ids=output_token_ids,
            lora_request=adapter,
        )
