"""Parameter names: what wrappers add is stripped as whole components, and layers are what people call layers."""

from __future__ import annotations

import pytest
import torch
from cases import tiny_model, train
from hypothesis import given
from hypothesis import strategies as st
from refusals_distributed import job
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from alr_kernels import AlrAdamW, Importance, layer_coefficients
from alr_kernels.names import WRAPPER_COMPONENTS, layer_of, unwrap


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("module.w", "w"),
        ("_orig_mod.module.layers.0.w", "layers.0.w"),
        ("layers.0._checkpoint_wrapped_module.w", "layers.0.w"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.w", "layers.0.w"),
        ("submodule.w", "submodule.w"),
        ("module_list.0.w", "module_list.0.w"),
        ("my_orig_mod.w", "my_orig_mod.w"),
        ("w", "w"),
    ],
)
def test_unwrap(name, bare):
    assert unwrap(name) == bare


parts = st.sampled_from(["layers", "0", "12", "q_proj", "weight", "modules", "h", *sorted(WRAPPER_COMPONENTS)])


@given(st.lists(parts, min_size=1, max_size=8).map(".".join))
def test_unwrap_is_idempotent_and_layers_ignore_wrappers(name):
    bare = unwrap(name)
    assert unwrap(bare) == bare
    assert unwrap("module." + name) == bare
    assert not WRAPPER_COMPONENTS & set(bare.split("."))
    for by in ("block", "module"):
        assert layer_of(name, by) == layer_of(bare, by)


def test_real_wrappers():
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    compiled = torch.compile(model)
    assert [unwrap(name) for name, _ in compiled.named_parameters()] == names
    assert next(compiled.named_parameters())[0] != names[0]
    parallel = torch.nn.DataParallel(model)
    assert [unwrap(name) for name, _ in parallel.named_parameters()] == names


WRAPPERS = {
    "none": lambda model: model,
    "ddp": DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled ddp": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "ddp of compiled": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "fsdp2": fully_shard,
    "compiled fsdp2": lambda model: torch.compile(fully_shard(model), backend="eager"),
    "checkpointed fsdp2": lambda model: fully_shard(checkpoint_wrapper(model)),
}


@pytest.mark.parametrize("before", WRAPPERS)
def test_importance_recorded_under_one_wrapper_is_used_under_another(before, tmp_path):
    """In one process: names are what is tested, not layouts."""
    path = tmp_path / "importance.safetensors"
    names = [name for name, _ in tiny_model().named_parameters()]
    with job(world=1, backend="gloo"):
        model = WRAPPERS[before](tiny_model())
        recording = AlrAdamW(model.named_parameters(), record=True)
        train(model, recording)
        recording.save_importance(path)
        importance = Importance.load(path)
        assert list(importance) == names
        for wrap in WRAPPERS.values():
            model = wrap(tiny_model())
            tuning = AlrAdamW(model.named_parameters(), importance)
            train(model, tuning)
            assert tuning.coeffs.keys() == layer_coefficients(importance).keys()
            assert all("anchor" in tuning.state[param] for param in model.parameters())


@pytest.mark.parametrize(
    ("name", "block", "module"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3", "model.layers.3.self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc.bias", "transformer.h.11", "transformer.h.11.mlp.c_fc"),
        ("encoder.block.0.layer.1.wi.weight", "encoder.block.0", "encoder.block.0.layer.1.wi"),
        ("model.layers.3.mlp.experts.5.up.weight", "model.layers.3", "model.layers.3.mlp.experts.5.up"),
        ("model.embed_tokens.weight", "model.embed_tokens", "model.embed_tokens"),
        ("lm_head.weight", "lm_head", "lm_head"),
        ("layer1.0.conv.weight", "layer1.0", "layer1.0.conv"),
        ("conv1x1.weight", "conv1x1", "conv1x1"),
        ("0.weight", "0", "0"),
        ("weight", "(root)", "(root)"),
        ("module.layers.3.w", "layers.3", "layers.3"),
    ],
)
def test_layer_of(name, block, module):
    assert layer_of(name) == layer_of(name, "block") == block
    assert layer_of(name, "module") == module
