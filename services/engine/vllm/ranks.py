"""What is added to each of vLLM's workers (`worker_extension_cls`): called over its executor, on the rank itself."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from services.engine.foreign import Kept, RankCache, byte_view, probe
from services.engine.shared_tensor import SharedTensor, share
from services.engine.vllm.layout import rank_cache, write
from services.parent import end_with_parent

end_with_parent("VllmWorker-", grace_s=5)  # vLLM's own watch begins late, and ends no wait for a message


class RankExtension:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: VllmConfig
    rank: int

    def tandem_attach(self, kept: Kept, num_blocks: int) -> tuple[Tensor | SharedTensor, RankCache]:
        """Let the rank's connector reach its model runner, probe its cache, and show it to the worker's process."""
        connector = get_kv_transfer_group()
        connector.runner = self.model_runner
        is_alone = self.vllm_config.parallel_config.tensor_parallel_size == 1
        self._tandem_view = view = byte_view(connector.caches, num_blocks, joins_layers=is_alone)
        shown = view if is_alone else share(view)
        context = self.vllm_config.compilation_config.static_forward_context
        layers = {name: context[name] for name in connector.caches}
        by_index = [(connector.caches[name], layer) for name, layer in layers.items()]
        packing = probe(view, kept, lambda index, values, slots: write(*by_index[index], kept, values, slots))
        if not is_alone:
            _unname_communicator()
        return shown, rank_cache(self.vllm_config, layers, packing)

    def tandem_mark(self, block_id: int) -> None:
        """Write the rank's number, and one, all over a block."""
        self._tandem_view[:, block_id] = self.rank + 1
        self.tandem_finish()

    def tandem_finish(self) -> None:
        """Wait until the rank's device has done all that was asked of it."""
        if self._tandem_view.is_cuda:
            torch.cuda.synchronize(self._tandem_view.device)

    def tandem_prepare(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        output_token_ids: list[int],
        sampling: SamplingParams,
        adapter: LoRARequest | None,
    ) -> None:
        """Make the first model runner (the second needs nothing) know a request as one preempted after this output."""
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


def _unname_communicator() -> None:
    """Take the name from the memory by which vLLM's ranks add up on CPUs: all have it, and who is killed leaves it."""
    group = get_tp_group()
    name = getattr(getattr(group.device_communicator, "dist_module", None), "group_name", None)
    if name is not None:
        with suppress(FileNotFoundError):
            os.unlink(f"/dev/shm/{name}_{group.rank_in_group}")
