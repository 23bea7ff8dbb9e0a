"""Weights arrive whole, in any format, cut for any rank; and what is wrong with a file is said in words."""

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.batch import ForwardBatch
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.config import BLOCK_SIZE
from engine.errors import UserError
from engine.gguf import GGUFFile
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.model_config import ModelConfig
from engine.models import Model, build_model
from engine.parallel.groups import Group

CPU = torch.device("cpu")
MODELS = {"llama": {"attention_bias": True, "mlp_bias": True}, "phi3": {}, "qwen3": {}, "gemma3": {}}


class SoloGroup(Group):
    """A rank that keeps its partial results: the test puts them together."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


def load(
    path: Path,
    group: Group | None = None,
    opened: AbstractContextManager[Checkpoint] | None = None,
    device: torch.device = CPU,
) -> Model:
    model = build_model(ModelConfig.from_path(path), torch.float32, device, group or Group())
    with opened or open_checkpoint(path) as ckpt:
        model.load(ckpt)
    return model


def linears(model: Model) -> list[ColumnParallelLinear | RowParallelLinear]:
    return [
        linear
        for layer in model.layers
        for linear in (layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    ]


def test_many_files_give_what_one_file_gives(tiny_checkpoint):
    one, many = tiny_checkpoint("llama"), tiny_checkpoint("llama", max_shard_size="100KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    for a, b in zip(linears(load(one)), linears(load(many)), strict=True):
        assert torch.equal(a.weight.tensor, b.weight.tensor)


def test_weights_are_converted_on_the_way(tiny_checkpoint):
    model = load(tiny_checkpoint("llama", dtype="bfloat16"))
    stored = load_file(tiny_checkpoint("llama", dtype="bfloat16") / "model.safetensors")
    down = stored["model.layers.1.mlp.down_proj.weight"]
    assert down.dtype == torch.bfloat16
    assert torch.equal(model.layers[1].mlp.down_proj.weight.tensor, down.float())


def test_progress_counts_every_byte_once(tiny_checkpoint):
    path = tiny_checkpoint("llama")
    seen: list[tuple[int, int]] = []
    load(path, opened=open_checkpoint(path, on_progress=lambda done, total: seen.append((done, total))))
    tensors = load_file(path / "model.safetensors")
    assert seen[-1][0] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(done <= total for done, total in seen)
    assert seen == sorted(seen)


@pytest.mark.parametrize("family", MODELS)
def test_the_shards_of_two_ranks_make_the_whole(family, tiny_checkpoint):
    path = tiny_checkpoint(family, **MODELS[family])
    whole, first, second = load(path), load(path, SoloGroup(0, 2)), load(path, SoloGroup(1, 2))
    for full, a, b in zip(linears(whole), linears(first), linears(second), strict=True):
        if isinstance(full, RowParallelLinear):
            assert torch.equal(full.weight.tensor, torch.cat([a.weight.tensor, b.weight.tensor], dim=1))
            assert b.bias is None, "a bias is added once in the sum of the ranks"
            continue
        sizes = list(full.parts.values())
        parts = zip(
            full.weight.tensor.split(sizes),
            a.weight.tensor.split(a.shares),
            b.weight.tensor.split(b.shares),
            strict=True,
        )
        assert all(torch.equal(x, torch.cat([y, z])) for x, y, z in parts)
    assert torch.equal(whole.embedding.weight, torch.cat([first.embedding.weight, second.embedding.weight]))


@pytest.mark.parametrize("family", MODELS)
def test_what_two_ranks_compute_sums_up_to_the_whole(family, tiny_checkpoint):
    path = tiny_checkpoint(family, **MODELS[family])
    whole, *ranks = load(path), load(path, SoloGroup(0, 2)), load(path, SoloGroup(1, 2))
    batch = prefill(torch.arange(3, 14))
    for attention in (attention for model in (whole, *ranks) for attention in model.attentions):
        attention.k_cache, attention.v_cache = torch.zeros(2, 2, attention.num_kv_heads, BLOCK_SIZE, attention.head_dim)
    with torch.inference_mode():
        x = torch.randn(11, 64, generator=torch.Generator().manual_seed(3))
        close = {"atol": 1e-5, "rtol": 1e-4}
        expected, *parts = (
            attention.o_proj(attention(x, batch)) for attention in (m.layers[1].attention for m in (whole, *ranks))
        )
        torch.testing.assert_close(sum(parts), expected, **close)
        torch.testing.assert_close(sum(rank.layers[1].mlp(x) for rank in ranks), whole.layers[1].mlp(x), **close)
        tokens = torch.tensor([0, 255, 256, 511], dtype=torch.int32)
        assert torch.equal(sum(rank.embedding(tokens) for rank in ranks), whole.embedding(tokens))
        logits = torch.cat([rank.logits(x) for rank in ranks], dim=-1)
        torch.testing.assert_close(logits, whole.logits(x), **close)


def prefill(token_ids: Tensor) -> ForwardBatch:
    length = len(token_ids)
    positions = torch.arange(length, dtype=torch.int32)
    one = torch.zeros(1, dtype=torch.int32)
    return ForwardBatch(
        token_ids.int(), positions, positions + BLOCK_SIZE, torch.tensor([0, length]).int(), one + length, one,
        (one + 1).unsqueeze(0), 0, length, length,
    )  # fmt: skip


def test_dummy_weights_depend_on_seed_and_name_only(tiny_checkpoint):
    path = tiny_checkpoint("llama")
    first, again, other = (load(path, opened=open_checkpoint(path, "dummy", seed=seed)) for seed in (1, 1, 2))
    rank = load(path, SoloGroup(1, 2), open_checkpoint(path, "dummy", seed=1))
    a, b, c = (model.layers[0].mlp.down_proj.weight.tensor for model in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(a, first.layers[1].mlp.down_proj.weight.tensor)
    assert torch.equal(rank.layers[0].mlp.down_proj.weight.tensor, a[:, 48:])
    assert a.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert torch.equal(first.norm.weight, torch.ones(64))


def test_dummy_weights_need_no_weight_files(tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint("llama") / "config.json", tmp_path)
    load(tmp_path, opened=open_checkpoint(tmp_path, "dummy"))


# --- what can be wrong with safetensors


@pytest.fixture
def broken(tiny_checkpoint, tmp_path) -> Path:
    """A copy of a good checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_checkpoint("llama"), tmp_path / "broken"))


def fails(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(path)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_weights_says_what_to_do(broken):
    (broken / "model.safetensors").unlink()
    fails(broken, str(broken), "--load-format dummy")
    (broken / "pytorch_model.bin").touch()
    fails(broken, "convert them to safetensors")


@pytest.mark.parametrize("num_bytes", [0, 5, 300, 100_000])
def test_a_file_cut_short_is_called_corrupt(broken, num_bytes):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    fails(broken, str(file), "corrupt", "download it again")


def test_garbage_is_called_corrupt(broken):
    (broken / "model.safetensors").write_bytes(b"\xff" * 5000)
    fails(broken, "model.safetensors", "corrupt")


def test_a_git_lfs_pointer_is_recognized(broken):
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    fails(broken, "git lfs pull")


def test_a_missing_tensor_is_named(broken):
    change_tensors(broken, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    fails(broken, "model.layers.1.mlp.up_proj.weight", str(broken))


def test_a_wrong_shape_is_told_with_the_right_one(broken):
    change_tensors(broken, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}))
    fails(broken, "model.norm.weight", "[32]", "[64]")


def test_weights_of_a_type_we_cannot_read_are_refused(broken):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(broken, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    fails(broken, name, "F8_E4M3")


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_and_broken_parts_of_a_sharded_checkpoint_are_named(tiny_checkpoint, tmp_path):
    path = Path(shutil.copytree(tiny_checkpoint("llama", max_shard_size="100KB"), tmp_path / "sharded"))
    part = sorted(path.glob("*.safetensors"))[1]
    part.unlink()
    fails(path, part.name)
    (path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    fails(path, "model.safetensors.index.json")


# --- GGUF

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, folder: Path, arch: str, rope_freqs: list[float] | None = None) -> Path:
    """What llama.cpp's converter makes of a folder: its names, its order of rows, its norms."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, dtype=np.float32))
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, kind = name.rpartition(".")
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        if arch.startswith("gemma") and stem.endswith("norm"):
            tensor = tensor + 1
        post = "post_attention_norm" if arch.startswith("gemma") else "ffn_norm"
        names = GGUF_NAMES | {"post_attention_layernorm": post}
        stored = GGUF_TOP[stem] if stem in GGUF_TOP else f"blk.{layer}.{names[part]}"
        writer.add_tensor(f"{stored}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GEMMA = {"query_pre_attn_scalar": 32}  # llama.cpp takes the width of a head for it
GGUF_MODELS = {
    "llama": ("llama", {"attention_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True} | GEMMA),
    "gemma3": ("gemma3", {"tie_word_embeddings": True, "sliding_window_pattern": 6, "num_hidden_layers": 6} | GEMMA),
    "phi3": ("phi3", {}),
}


@pytest.mark.parametrize("arch", GGUF_MODELS)
def test_a_gguf_holds_the_model_it_was_made_from(arch, tiny_checkpoint, tmp_path):
    family, overrides = GGUF_MODELS[arch]
    folder = tiny_checkpoint(family, **overrides)
    file = write_gguf(tmp_path / "model.gguf", folder, arch)
    expected, found = load(folder), load(file)
    for a, b in zip(linears(expected), linears(found), strict=True):
        assert torch.equal(a.weight.tensor, b.weight.tensor)
        assert a.bias is None or torch.equal(a.bias, b.bias)
    torch.testing.assert_close(found.norm.weight, expected.norm.weight)
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    for name in ("layer_windows", "layer_ropes", "attention_scale", "final_softcap", "has_qk_norm", "head_dim"):
        assert getattr(found.config, name) == getattr(expected.config, name), name
    assert found.config.eos_token_ids == (2, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rank", [None, 0, 1])
@pytest.mark.parametrize("arch", GGUF_MODELS)
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_a_gpu_gets_the_weights_that_a_cpu_gets(form, arch, rank, tiny_checkpoint, tmp_path):
    family, overrides = GGUF_MODELS[arch]
    path = folder = tiny_checkpoint(family, dtype="float32" if form == "gguf" else "bfloat16", **overrides)
    if form == "gguf":
        path = write_gguf(tmp_path / "model.gguf", folder, arch)
    group = None if rank is None else SoloGroup(rank, 2)
    expected, found = load(path, group), load(path, group, device=torch.device("cuda"))
    for a, b in zip(linears(expected), linears(found), strict=True):
        assert torch.equal(a.weight.tensor, b.weight.tensor.cpu())
        assert a.bias is None or torch.equal(a.bias, b.bias.cpu())
    for a, b in zip(expected.layers, found.layers, strict=True):
        assert torch.equal(a.input_norm.weight, b.input_norm.weight.cpu())
    assert torch.equal(expected.embedding.weight, found.embedding.weight.cpu())


def test_two_ranks_share_a_gguf(tiny_checkpoint, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", tiny_checkpoint("llama"), "llama")
    whole, first, second = load(file), load(file, SoloGroup(0, 2)), load(file, SoloGroup(1, 2))
    for full, a, b in zip(linears(whole), linears(first), linears(second), strict=True):
        if isinstance(full, RowParallelLinear):
            assert torch.equal(full.weight.tensor, torch.cat([a.weight.tensor, b.weight.tensor], dim=1))
        else:
            sizes = list(full.parts.values())
            parts = zip(
                full.weight.tensor.split(sizes),
                a.weight.tensor.split(a.shares),
                b.weight.tensor.split(b.shares),
                strict=True,
            )
            assert all(torch.equal(x, torch.cat([y, z])) for x, y, z in parts)


def test_the_frequencies_of_a_llama_3_gguf_are_stretched(tiny_checkpoint, tmp_path):
    """llama.cpp stores Llama 3.1's scaling worked out, as one divisor a frequency."""
    from engine.layers.rotary import frequencies

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = tiny_checkpoint("llama", rope_scaling=scaling | {"original_max_position_embeddings": 64})
    stretched = load(folder).config.layer_ropes[0]
    plain = load(tiny_checkpoint("llama")).config.layer_ropes[0]
    divisors = frequencies(plain, 512) / frequencies(stretched, 512)
    file = write_gguf(tmp_path / "model.gguf", tiny_checkpoint("llama"), "llama", divisors.tolist())
    found = load(file).config.layer_ropes[0]
    torch.testing.assert_close(frequencies(found, 512), frequencies(stretched, 512))


def test_quantized_blocks_are_worked_out_as_the_format_says(default_model):
    """The formats' own arithmetic, element by element: Q4_1 is d · q + m over 32 numbers, Q8_0 is d · q."""
    data, header = default_model.read_bytes(), GGUFFile(default_model)
    model = load(default_model)
    down = header.tensors["blk.7.ffn_down.weight"]
    for row, column in ((0, 0), (5, 17), (575, 1535), (300, 40)):
        at = down.offset + (row * 1536 + column) // 32 * 20
        d, m = np.frombuffer(data, "<f2", 2, at).astype(np.float32)
        packed = data[at + 4 + column % 16]
        q = packed >> 4 if column % 32 >= 16 else packed & 15
        assert model.layers[7].mlp.down_proj.weight.tensor[row, column].item() == d * np.float32(q) + m
    table = header.tensors["token_embd.weight"]
    for row, column in ((0, 0), (49151, 575), (1234, 100)):
        at = table.offset + (row * 576 + column) // 32 * 34
        d = np.frombuffer(data, "<f2", 1, at).astype(np.float32)[0]
        q = np.frombuffer(data, "i1", 1, at + 2 + column % 32)[0]
        assert model.embedding.weight[row, column].item() == d * np.float32(q)


@pytest.mark.parametrize("num_bytes", [0, 3, 4, 100, 3000, 120_000])
def test_a_gguf_cut_short_is_told_so(num_bytes, tiny_checkpoint, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", tiny_checkpoint("llama"), "llama")
    file.write_bytes(file.read_bytes()[:num_bytes])
    fails(file, str(file), "download it again")


def test_a_gguf_of_an_unknown_kind_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fails(tmp_path / "model.gguf", "mamba", "LlamaForCausalLM")


def test_a_gguf_type_we_cannot_read_is_named(tiny_checkpoint, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", tiny_checkpoint("llama"), "llama")
    data = file.read_bytes()
    name = b"blk.0.ffn_up.weight"
    kind_at = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and two of them
    file.write_bytes(data[:kind_at] + (99).to_bytes(4, "little") + data[kind_at + 4 :])
    fails(file, "model.layers.0.mlp.up_proj.weight", "unknown type 99", "Q8_0")
