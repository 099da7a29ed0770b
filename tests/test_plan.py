"""Plans are counts: of live tensors in one process, of FSDP2's shards, of published models."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from lora_models import MIXED, Mixed, adapted, gpt2
from plan_cases import counted, live_bytes, llama

from alr_kernels import AlrAdamW, lora_pairs
from alr_kernels.planning import DEVICES, Device, Lora, Setup, plan, read_model
from alr_kernels.planning.counting import KEPT, held, items_of, local_numel, shard_rows

ROOT = Path(__file__).parent.parent
LLAMA_8B = ROOT / "docs/examples/configs/llama-3.1-8b.json"
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTED = {"q_proj", "v_proj"}


def single(**options):
    return Setup(strategy="single", **options)


@cache
def tiny_llama():
    return llama()


def trained(model, setup, pairs=None):
    """Take a real step of a model as the setup says, and return the optimizer."""
    shapes = {name: param.shape for name, param in model.named_parameters() if param.requires_grad}
    if pairs is not None:
        shapes = {pair.name: pair.shape for pair in pairs}
    importance = {name: torch.rand(shape) + 0.1 for name, shape in shapes.items()} if setup.penalised else None
    options = {
        "state_dtype": setup.state_dtype,
        "importance_dtype": setup.importance_dtype,
        "anchor_dtype": setup.anchor_dtype,
        "master": setup.master,
        "mode": setup.mode,
        "record": setup.records,
    }
    optimizer = AlrAdamW(model.named_parameters(), importance, lora=pairs, **options)
    for param in model.parameters():
        param.grad = torch.randn_like(param) if param.requires_grad else None
    optimizer.step()
    return optimizer


# ---- one process: live tensors ----


@st.composite
def setups(draw):
    phase = draw(st.sampled_from(["plain", "record", "tune", "both"]))
    dtype = draw(st.sampled_from(["fp32", "bf16", "fp16"]))
    penalised = phase in ("tune", "both")
    return single(
        phase=phase,
        dtype=dtype,
        mode=draw(st.sampled_from(["proximal", "coupled"])),
        state_dtype=draw(st.sampled_from(["fp32", "bf16", "int8"])),
        importance_dtype=draw(st.sampled_from([None, "fp32", "bf16", "int8", "int4"])) if penalised else None,
        anchor_dtype=draw(st.sampled_from([None, "fp32", "bf16"])) if penalised else None,
        master=draw(st.sampled_from(["none", "split", "stochastic"])) if dtype == "bf16" else "none",
    )


@given(setups())
def test_every_option_counts_as_its_live_tensors(setup) -> None:
    model = copy.deepcopy(tiny_llama()).to(TORCH[setup.dtype])
    column = plan(model, setup=setup).columns[0]
    live = live_bytes(trained(model, setup), model)
    assert counted(column.kept) == live
    # a step reads all of it but the start and the counts, and writes back what it changes
    once = ("gradients", "importance", "importance_scales", "anchor")
    twice = ("weights", "moments", "moment_scales", "remainder", "path_integral")
    assert column.moved == sum(live.get(part, 0) for part in once) + 2 * sum(live.get(part, 0) for part in twice)


@pytest.mark.parametrize("mode", ["proximal", "coupled"])
@pytest.mark.parametrize("phase", ["plain", "record", "tune", "both"])
@pytest.mark.parametrize(("dtype", "master"), [("fp32", "none"), ("bf16", "none"), ("bf16", "split")])
def test_lora_counts_as_its_live_tensors(phase, dtype, master, mode) -> None:
    bare = llama()
    weights = read_model(bare)
    model = peft.get_peft_model(bare, peft.LoraConfig(r=8, target_modules=[*ADAPTED])).to(TORCH[dtype])
    kept = {"importance_dtype": "int8"} if phase in ("tune", "both") else {}
    lora = Lora(8, ("q_proj", "v_proj"), dtype)
    setup = single(phase=phase, mode=mode, master=master, state_dtype="int8", dtype=dtype, lora=lora, **kept)
    column = plan(weights, setup=setup).columns[0]
    live = live_bytes(trained(model, setup, lora_pairs(model)), model)
    assert counted(column.kept) == live
    factors = 2 * sum(live.get(part, 0) for part in ("weights", "moments", "moment_scales", "remainder"))
    factors += live["gradients"] + live.get("anchor", 0)
    importance = live.get("importance", 0) + live.get("importance_scales", 0)
    passes = 2 if mode == "proximal" else 1
    assert column.moved == factors + passes * importance + 2 * live.get("path_integral", 0)


def test_factors_are_float32_beside_a_bf16_model_as_peft_makes_them() -> None:
    bare = llama().bfloat16()
    column = plan(read_model(bare), setup=single(lora=Lora(4, ("q_proj",)))).columns[0]
    model = peft.get_peft_model(bare, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    setup = single(lora=Lora(4, ("q_proj",)))
    assert counted(column.kept) == live_bytes(trained(model, setup, lora_pairs(model)), model)


@pytest.mark.parametrize(
    ("build", "targets", "changed"),
    [(gpt2, ["c_attn", "wte"], {}), (Mixed, MIXED, {}), (gpt2, ["attn.c_proj"], {"fan_in_fan_out": True})],
)
def test_lora_of_every_kind_of_layer(build, targets, changed) -> None:
    """Conv1D and embeddings lie the other way round, convolutions have kernels; of a tied head there is one weight."""
    bare = build()
    weights = read_model(bare)
    setup = single(phase="both", lora=Lora(2, tuple(targets)))
    model = adapted(bare, targets, **changed)
    live = live_bytes(trained(model, setup, lora_pairs(model)), model)
    assert counted(plan(weights, setup=setup).columns[0].kept) == live


def test_a_start_beside_a_rounded_anchor_has_its_own_memory() -> None:
    """But not of a bf16 checkpoint that was widened: then the two are equal, and less is held than planned."""
    setup = single(phase="both", anchor_dtype="bf16")
    model = llama()
    planned = plan(model, setup=setup).columns[0].kept
    live = live_bytes(trained(model, setup), model)
    assert planned["start"] == live["start"] > 0
    widened = llama().bfloat16().float()
    assert live_bytes(trained(widened, setup), widened).get("start", 0) == 0


def test_ddp_adds_its_buckets() -> None:
    model = tiny_llama()
    ddp, view = (plan(model, [3], Setup("ddp", bucket_view=flag)).columns[0] for flag in (False, True))
    one = plan(model, setup=single()).columns[0]
    assert counted(view.kept) == counted(one.kept)
    assert counted(ddp.kept) == counted(one.kept) | {"buckets": one.kept["weights"]}


# ---- shards ----


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("shape", [(1,), (5,), (10, 3), (64, 2), (63, 2), (65, 1, 3), (4096,)])
def test_shards_are_torch_s_chunks(shape, shards) -> None:
    from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty

    chunks = _chunk_with_empty(torch.empty(shape), shards, dim=0)
    assert [local_numel(shape, shards, rank) for rank in range(shards)] == [chunk.numel() for chunk in chunks]
    assert [shard_rows(shape[0], shards, rank) for rank in range(shards)] == [
        chunk.shape[0] if chunk.numel() else 0 for chunk in chunks
    ]


def test_a_scalar_is_whole_where_nothing_is_sharded() -> None:
    model = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(()))})
    assert plan(model, [2], Setup("ddp")).columns[0].kept["weights"] == 4


@pytest.mark.parametrize("shards", [2, 3, 5, 200])
@pytest.mark.parametrize("lora", [None, Lora(8)])
def test_what_ranks_keep_adds_up(shards, lora) -> None:
    """The optimizer's tensors are cut without padding; weights and gradients are padded to the fullest rank's."""
    setup = Setup(phase="both", state_dtype="int8", importance_dtype="int4", lora=lora)
    model = read_model(tiny_llama())
    adapted_names = {w.name for w in model.weights if w.name.split(".")[-2] in ADAPTED}
    items = items_of(model.weights, setup, adapted_names)
    whole = held(items, setup, 1, 0)
    ranks = [held(items, setup, shards, rank) for rank in range(shards)]
    for part in KEPT:
        sizes = [rank[part] for rank in ranks]
        assert sizes == sorted(sizes, reverse=True), part
        if part in ("weights", "frozen_weights", "gradients"):
            assert len(set(sizes)) == 1, part
            assert sum(sizes) >= whole[part], part
        elif part != "steps":
            assert sum(sizes) == whole[part], part
    column = plan(model, [shards], setup).columns[0]
    assert (column.kept, column.emptiest) == (ranks[0], ranks[-1])


FSDP2 = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from plan_cases import live_bytes, llama

rank, world, lora = map(int, sys.argv[1:])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
bare = model = llama()
if lora:
    import peft

    model = peft.get_peft_model(bare, peft.LoraConfig(r=lora, target_modules=["q_proj", "v_proj"]))
groups = [*bare.model.layers, model]
for module in groups:
    fully_shard(module, mesh=mesh)
tokens = torch.zeros(1, 4, dtype=torch.long)
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer = torch.optim.AdamW(model.parameters())
optimizer.step()
live = live_bytes(optimizer, model)
unsharded = []
for module in groups:
    params = module._get_fsdp_state()._fsdp_param_group.fsdp_params
    whole = [(4 * param._orig_size.numel(), param.sharded_param.requires_grad) for param in params]
    unsharded.append([sum(size for size, _ in whole), sum(size for size, trained in whole if trained)])
print(json.dumps({"live": live, "unsharded": unsharded}))
"""


@pytest.mark.parametrize(
    ("rank", "world", "lora"), [(0, 4, 0), (3, 4, 0), (49, 50, 0), (0, 4, 5), (3, 4, 5), (1, 2, 3)]
)
def test_fsdp2_holds_what_is_planned(rank, world, lora, tmp_path) -> None:
    """torch's own fully_shard, stepped by torch's AdamW, on a process group that only pretends to communicate."""
    script = tmp_path / "fsdp2.py"
    script.write_text(FSDP2, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), *map(str, (rank, world, lora))], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    setup = Setup("fsdp2", phase="plain", lora=Lora(lora) if lora else None)
    column = plan(tiny_llama(), [world], setup).columns[0]
    assert counted(column.kept if rank == 0 else column.emptiest) == found["live"]
    *blocks, root = found["unsharded"]
    weights = sorted(size for size, _ in blocks)
    assert column.in_model == {
        "unsharded_outside_blocks": root[0],
        "unsharded_block": weights[-1],
        "prefetched_block": weights[-2],
        "unsharded_gradients": max(trained for _, trained in found["unsharded"]),
    }


def test_hsdp_is_fsdp2_of_one_replica() -> None:
    hsdp = plan(tiny_llama(), [8, 16], Setup("hsdp", shard=8)).columns
    (fsdp2,) = plan(tiny_llama(), [8]).columns
    assert [column.shards for column in hsdp] == [8, 8]
    assert [column.kept for column in hsdp] == [fsdp2.kept, fsdp2.kept]
    assert hsdp[1].gpus == 16


def test_what_a_step_gathers_of_lora() -> None:
    """Of linear layers A [8, 128]; tests/distributed_plan_cases.py counts the messages of real steps of every kind."""
    count = 4 * 8 * 128 * 4  # two modules in two layers, float32
    gram = 4 * 8 * 8 * 8  # float64

    def sent(**options):
        return plan(tiny_llama(), [4], Setup(lora=Lora(8), **options)).columns[0].communicated

    def found(**options):
        return tuple(sent(**options)[part] for part in ("gathered_factors", "reduced_pull"))

    assert found(phase="tune") == (3 * count, 2 * count)  # A, its anchor, A again; pull and curvature
    assert found(phase="both") == (5 * count, 2 * count + gram)  # and its gradient, and after the step
    assert found(phase="tune", mode="coupled") == (3 * count, count)  # A, its anchor, its gradient; pull
    assert found(phase="both", mode="coupled") == (4 * count, count + gram)
    assert found(phase="record") == (3 * count, gram)
    assert found(phase="plain") == (0, 0)
    assert sent(phase="tune")["statistics"] == 8 * 8 + 4 * 7 * 8  # eight norms; seven numbers of four pairs
    assert sent(phase="record")["statistics"] == 8 * 8 + 8 * 7 * 8  # seven of eight factors
    alone = plan(tiny_llama(), [1], Setup(lora=Lora(8), phase="both")).columns[0]
    assert not any(alone.communicated.values())


# ---- how many devices, how long ----


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
@pytest.mark.parametrize("share", [0.99, 0.7, 0.55, 0.51])
def test_the_least_number_of_devices_is_found(strategy, share) -> None:
    def setup(count):
        return Setup("hsdp", shard=count) if strategy == "hsdp" else Setup()

    peaks = [plan(tiny_llama(), [count], setup(count)).columns[0].peak for count in range(1, 40)]
    memory = share * peaks[0]
    least = next(count for count, peak in enumerate(peaks, 1) if peak <= memory)
    assert least > 1
    found = plan(tiny_llama(), [4], setup(4), Device("d", memory, 1e9))
    assert found.enough == least
    assert found.columns[0].fits is (least <= 4)


def test_too_little_memory_for_any_number() -> None:
    assert plan(tiny_llama(), [1], Setup(), Device("d", 1e5, 1e9)).enough is None
    whole = plan(tiny_llama(), [1], single()).columns[0].peak
    assert plan(tiny_llama(), [9], Setup("ddp"), Device("d", whole, 1e9)).enough is None  # buckets
    assert plan(tiny_llama(), [9], Setup("ddp", bucket_view=True), Device("d", whole, 1e9)).enough == 1


def test_time_is_traffic_over_bandwidth() -> None:
    (one, two) = plan({"w": [4096, 4096]}, [1, 2], Setup(phase="both"), DEVICES["H100"]).columns
    assert one.moved == 44 * 4096**2
    assert one.seconds == pytest.approx(44 * 4096**2 / 3.35e12)
    assert two.seconds == pytest.approx(one.seconds / 2)


# ---- models ----


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gptj", "gpt2", "bert", "vit", "t5"])
def test_a_config_gives_the_model_s_own_tensors(kind, tmp_path) -> None:
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
        "num_key_value_heads": 1, "n_embd": 32, "n_head": 2, "n_layer": 1, "rotary_dim": 8, "d_model": 32, "d_ff": 48,
        "num_layers": 1, "num_heads": 2, "d_kv": 16, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": kind, **small}), encoding="utf-8")
    found = read_model(path)
    config = transformers.AutoConfig.for_model(kind, **small)
    auto = transformers.AutoModel if kind in ("vit", "t5") else transformers.AutoModelForCausalLM
    expected = {name: tuple(param.shape) for name, param in auto.from_config(config).named_parameters()}
    assert {weight.name: weight.shape for weight in found.weights} == expected
    assert {weight.dtype for weight in found.weights} == {"fp32"}


def test_the_class_and_dtype_that_a_config_names() -> None:
    content = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "dtype": "bfloat16",
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40,
    }  # fmt: skip
    found = read_model(content)
    assert "classifier.weight" in {weight.name for weight in found.weights}
    assert {weight.dtype for weight in found.weights} == {"bf16"}


def test_published_parameters() -> None:
    found = plan(LLAMA_8B, [1], Setup())
    assert (found.parameters, found.tensors) == (8_030_261_248, 291)
    assert found.columns[0].kept["weights"] == 2 * 8_030_261_248


def test_a_table_of_shapes() -> None:
    found = plan({"a.q_proj.weight": [64, 256], "a.q_proj.bias": [64]}, [4], Setup(lora=Lora(4, ("q_proj",))))
    assert found.columns[0].kept["importance"] == 16 * 256 * 4
    assert found.trained_parameters == 4 * (64 + 256)
