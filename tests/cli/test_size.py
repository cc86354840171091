"""`tandem size`: known models give known bytes, and they are the engine's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from services.cli.config import DEMO_MODEL, SizeConfig
from services.cli.main import main
from services.cli.size.sizing import Sizes, size
from services.engine.check import look_at_model
from services.engine.checkpoint import num_parameters
from services.engine.model_config import ModelConfig, parse_config, read_config
from services.engine.native.model.model import load_model
from tests.hf_models import FAMILIES, write_model

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def llama() -> ModelConfig:
    return parse_config(LLAMA_3_8B, None)


def test_llama_3_8b(llama: ModelConfig) -> None:
    sizes = size(llama, SizeConfig(max_num_seqs=10, prompt_tokens=2000, request_rate=2.0, num_workers=3))
    assert num_parameters(llama) == 8_030_261_248  # what its model card says
    assert sizes.kv_bytes_per_token == 131_072  # 2 * 32 layers * 8 heads * 128 * 2 bytes
    assert sizes.block_bytes == 32 * 131_072
    budget = int((80 << 30) * 0.9) - 2 * 8_030_261_248
    assert sizes.num_blocks_per_worker == budget // sizes.block_bytes
    assert sizes.max_concurrent_at_context == sizes.num_blocks_per_worker // 256
    assert sizes.kv_bytes_for_max_num_seqs == 10 * 8192 * 131_072
    assert (sizes.handoff_blocks, sizes.handoff_bytes) == (63, 63 * sizes.block_bytes)
    assert sizes.handoff_seconds == pytest.approx(63 * 4 * 2**20 * 8 / 100e9)
    assert sizes.store_blocks == (64 << 30) // sizes.block_bytes
    assert sizes.index_blocks == 3 * sizes.num_blocks_per_worker + sizes.store_blocks
    assert sizes.store_window_seconds == pytest.approx(sizes.store_blocks / 126)


def test_the_requests_of_a_step_are_those_of_a_device_with_so_much_memory(llama: ModelConfig) -> None:
    assert size(llama, SizeConfig()).max_num_seqs == 1024
    assert size(llama, SizeConfig(gpu_memory_bytes=24 << 30)).max_num_seqs == 256


def test_the_dtype_is_the_checkpoints_unless_it_is_said(llama: ModelConfig) -> None:
    assert size(llama, SizeConfig(dtype="float")).kv_bytes_per_token == 2 * 131_072
    assert size(llama, SizeConfig(dtype="half")).dtype == "float16"
    assert size(llama, SizeConfig()).dtype == "bfloat16"
    in_8_bits = size(llama, SizeConfig(kv_cache_dtype="int8"))
    assert (in_8_bits.dtype, in_8_bits.kv_cache_dtype) == ("bfloat16", "int8")
    assert in_8_bits.kv_bytes_per_token == 2 * 32 * 8 * (128 + 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_the_engines_and_the_weights_are_those_on_disk(family: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", family)
    config = read_config(directory)
    model = load_model(str(directory), dtype="float32", device="cpu")
    for kv_cache_dtype in ("auto", "int8"):
        kept = replace(model, kv_cache_dtype=kv_cache_dtype)
        sized = size(config, SizeConfig(dtype="float32", kv_cache_dtype=kv_cache_dtype))
        block_bytes = kept.block_layout(32).block_bytes
        assert sized.block_bytes == look_at_model(str(directory)).block_bytes(32, kv_cache_dtype) == block_bytes
        assert kept.new_kv_cache(1, 32).nbytes == block_bytes
    num_on_disk = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            num_on_disk += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    assert num_parameters(config) == num_on_disk


@given(
    block_size=st.sampled_from([16, 32, 64]),
    memory=st.integers(1, 1 << 40),
    context=st.integers(1, 1 << 20),
    prompt=st.integers(1, 1 << 20),
)
def test_what_is_promised_fits(block_size: int, memory: int, context: int, prompt: int) -> None:
    config = SizeConfig(
        block_size=block_size, kv_cache_memory_bytes=memory, max_model_len=context, prompt_tokens=prompt
    )
    sizes = size(parse_config(LLAMA_3_8B, None), config)
    assert sizes.kv_pool_bytes_per_worker <= memory
    assert sizes.max_concurrent_at_context * context <= sizes.num_tokens_per_worker
    assert sizes.max_concurrent_at_prompt * sizes.handoff_bytes <= memory
    assert prompt <= sizes.handoff_blocks * block_size < prompt + block_size


def test_a_draft_model_takes_weights_and_room_in_each_block() -> None:
    llama = parse_config(LLAMA_3_8B, None)
    config = SizeConfig(kv_cache_memory_bytes=1 << 32)
    alone, both = size(llama, config), size(llama, config, replace(llama, num_layers=2))
    assert both.draft_block_bytes * llama.num_layers == 2 * alone.block_bytes
    assert 0 < both.draft_weight_bytes < alone.weight_bytes == both.weight_bytes
    assert both.num_blocks_per_worker == (1 << 32) // (both.block_bytes + both.draft_block_bytes)
    assert both.kv_pool_bytes_per_worker <= 1 << 32
    assert both.handoff_bytes == alone.handoff_bytes, "it does not travel"


def test_the_table_and_the_json_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "--json", "--gpu-memory-bytes", "1GiB"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = size(read_config(DEMO_MODEL), SizeConfig(gpu_memory_bytes=1 << 30))
    assert Sizes(**told) == expected
    assert told.keys() == asdict(expected).keys()
    assert main(["size", "--gpu-memory-bytes", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert f"{expected.num_blocks_per_worker:,} blocks" in text
    assert "64 KiB" in text


def test_a_model_that_does_not_fit_is_said_to_and_the_status_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["size", "--gpu-memory-bytes", "4MiB"]) == 1
    assert "One request of full length does not fit: lower --max-model-len" in capsys.readouterr().out
    assert main(["size", "--gpu-memory-bytes", "4MiB", "--max-model-len", "32"]) == 0
    capsys.readouterr()
    assert main(["size", "--gpu-memory-bytes", "2MiB"]) == 1
    assert (
        "The weights do not fit: they need 2.0 MiB, and a worker has 1.8 MiB (0.9 of 2 MiB)" in capsys.readouterr().out
    )
    assert main(["size", "--gpu-memory-bytes", "2MiB", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["fits"], told["weights_fit"]) == (False, False)


def test_what_cannot_be_sized_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["size", "--model", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(SystemExit, match="2"):
        main(["size", "--model", str(tmp_path)])
    assert "MambaForCausalLM" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["size", "--bandwidth-gbit-per-s", "0"])
    assert "--bandwidth-gbit-per-s" in capsys.readouterr().err


def test_it_needs_no_torch() -> None:
    code = "import sys; from services.cli.main import main; main(['size']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=150, capture_output=True)
