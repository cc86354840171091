"""Imports of vLLM what each worker needs: for a process that forks workers. Starts no thread and touches no device."""

from services.engine.vllm.arguments import prepare_environment

prepare_environment()

import vllm.model_executor.layers.quantization.online.base  # noqa: E402  # looked up for every model
import vllm.v1.executor.uniproc_executor  # noqa: E402
import vllm.v1.worker.gpu_worker  # noqa: E402, F401  # that of CPUs is made of it

import services.engine.vllm.connector  # noqa: E402
import services.engine.vllm.engine  # noqa: E402, F401
