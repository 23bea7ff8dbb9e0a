from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from engine import memory
from tests.engine.test_core import generate, make_core


def test_an_engine_on_a_cpu_tells_its_blocks_and_its_memory(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    core = make_core(folder)
    generate(core, [list(range(3, 40))])
    inspection = core.inspect()
    assert inspection.block_stride == 1
    assert len(inspection.blocks) == core.ready.num_blocks
    assert inspection.blocks.count(1) == core.scheduler.pool.num_remembered == 3
    assert inspection.memory["kv_cache"] == core.ready.kv_cache_bytes
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert inspection.memory["weights"] == stored
    assert inspection.memory["resident"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)
    assert inspection.fragmentation is None


def test_the_kinds_of_a_gpus_memory_add_up_to_all_of_it(monkeypatch):
    stats = {"reserved_bytes.all.current": 400, "inactive_split_bytes.all.current": 100}
    cuda = SimpleNamespace(mem_get_info=lambda device: (50, 1000), memory_stats=lambda device: stats)
    monkeypatch.setattr(torch, "cuda", cuda)
    device = torch.device("cuda", 0)
    kinds = memory.device_memory(device, {"weights": 300, "kv_cache": 500})
    assert kinds == {"weights": 300, "kv_cache": 500, "other": 150, "free": 50}
    assert memory.fragmentation(device) == 0.25
