"""Real training under DDP, FSDP2 and Accelerate: with the gradients that it made, a whole run takes the same steps."""

from __future__ import annotations

import copy

import lora_models
import pytest
import torch
import torch.distributed as dist
import transformers
from distributed_cases import importance_of, mesh_of, same_state
from distributed_lora_cases import CLOSE, local_of, random_importance
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from alr_kernels import AlrAdamW, Importance, lora_pairs
from alr_kernels.names import unwrap

OPTIONS = {"lr": 3e-3, "weight_decay": 0.1, "reg_lambda": 0.5, "record": True, "stats": True}
STEPS = 3


def llama(tied=False, vocabulary=37):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def batch(step, rank, vocabulary=37):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(vocabulary, (2, 12), generator=generator)


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def whole_gradients(model):
    return {
        unwrap(name): (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def follow(model, run, reference, straight, backward, exact=True):
    """Train ``model``; give its gradients to ``reference``; both must take the same steps."""
    for step in range(STEPS):
        backward(step)
        grads = whole_gradients(model)
        for name, param in reference.named_parameters():
            param.grad = grads.get(name)
        run.step()
        straight.step()
        run.zero_grad()
        if exact:
            same_state(straight, run, (reference, model))
    assert run.recorded_steps == STEPS


def fsdp2(options, kind, mixed, folder):
    mesh = mesh_of(kind)[0]
    model, reference = llama(tied=kind == "hsdp"), llama(tied=kind == "hsdp")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    extra = {"mp_policy": policy} if mixed else {}
    if options.pop("offload", False):
        extra["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **extra)
    fully_shard(model, mesh=mesh, **extra)
    importance = importance_of(reference)
    run, straight = (AlrAdamW(m.named_parameters(), importance, **OPTIONS, **options) for m in (model, reference))
    moved = copy.deepcopy(reference.state_dict())

    def backward(step):
        for half in range(2):  # two micro-batches: accumulated
            model.set_requires_gradient_sync(half == 1)
            loss_of(model, batch(step, 10 * half + dist.get_rank())).backward()

    follow(model, run, reference, straight, backward, exact=not options)
    assert any(not torch.equal(v, moved[k]) for k, v in reference.state_dict().items())
    run.save_importance(folder / "fsdp2.safetensors", xi=1e-3)
    recorded, expected = Importance.load(folder / "fsdp2.safetensors"), straight.recorded_importance(xi=1e-3)
    assert list(recorded) == list(expected)
    assert all(len({*map(float, torch.unique(recorded[name]))}) > 1 for name in recorded if recorded[name].numel() > 2)
    if not options:
        assert all(torch.equal(recorded[name], expected[name]) for name in expected)
    dist.barrier()


def ddp(folder):
    model = DistributedDataParallel(llama())
    reference = llama()
    importance = importance_of(reference)
    run = AlrAdamW(model.named_parameters(), importance, max_grad_norm=0.5, **OPTIONS)
    straight = AlrAdamW(reference.named_parameters(), importance, max_grad_norm=0.5, **OPTIONS)
    world = dist.get_world_size()

    def backward(step):
        loss_of(model, batch(step, dist.get_rank())).backward()
        if step == 0:  # the reference really sees what all ranks saw
            probe = copy.deepcopy(reference)
            (sum(loss_of(probe, batch(step, rank)) for rank in range(world)) / world).backward()
            for (name, p), (_, q) in zip(probe.named_parameters(), model.named_parameters(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)

    follow(model, run, reference, straight, backward)
    run.save_importance(folder / "ddp.safetensors")  # every rank has all of it and writes the same file, atomically
    assert list(Importance.load(folder / "ddp.safetensors")) == [n for n, _ in reference.named_parameters()]


def lora(kind, estimator, targets, folder):
    """PEFT under DDP or FSDP2: U's importance, penalty and ω of the whole job."""
    model = lora_models.adapted(llama(), targets, r=3)
    reference = lora_models.adapted(llama(), targets, r=3)
    pairs = [lora_pairs(m, estimator=estimator) for m in (model, reference)]
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        pairs[0] = lora_pairs(model, estimator=estimator)
    importance = random_importance(pairs[1])
    runs = [
        AlrAdamW([(n, p) for n, p in m.named_parameters() if p.requires_grad], importance, lora=found, **OPTIONS)
        for m, found in zip((model, reference), pairs, strict=True)
    ]  # fmt: skip
    world = dist.get_world_size()
    for step in range(STEPS):
        loss_of(model, batch(step, dist.get_rank())).backward()
        loss = sum(loss_of(reference, batch(step, rank)) for rank in range(world)) / world
        loss.backward()  # for exact its hooks must see all batches
        for (name, p), (other, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            assert unwrap(name) == other
            if q.grad is not None:
                expected, got = local_of(q.grad, p.grad)
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
        for run in runs:
            run.step()
            run.zero_grad()
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        expected, got = local_of(q.detach(), p.detach())
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    recorded = [run.recorded_importance(xi=1e-3) for run in runs]
    for name in recorded[1]:
        expected, got = local_of(recorded[1][name], recorded[0][name])
        torch.testing.assert_close(got, expected, rtol=0.1, atol=0.02 * float(recorded[1][name].max()))
        assert float(recorded[1][name].max()) > 0
    assert CLOSE


def after_evaluation(folder):
    """A forward pass without backward leaves the root's parameters whole: refused, for their memory is released."""
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        loss_of(model, batch(0, 0))
    early = AlrAdamW(model.named_parameters(), **OPTIONS)
    model.reshard()
    run = AlrAdamW(model.named_parameters(), **OPTIONS)
    loss_of(model, batch(0, dist.get_rank())).backward()
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight' has no memory any more.*model\.reshard"):
        early.step()
    run.step()
    assert all("exp_avg" in run.state[param] for param in model.parameters())


ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "ddp": (ddp,),
    "fsdp2 after evaluation": (after_evaluation,),
    "fsdp2": (fsdp2, {}, "rows", False),
    "fsdp2 mixed precision": (fsdp2, {}, "rows", True),
    "fsdp2 hsdp, tied": (fsdp2, {}, "hsdp", False),
    "fsdp2 offloaded": (fsdp2, {"offload": True}, "rows", False),
    "fsdp2 clipped": (fsdp2, {"max_grad_norm": 0.5}, "rows", True),
    "ddp lora": (lora, "ddp", "tangent", ATTENTION),
    "ddp lora exact": (lora, "ddp", "exact", ATTENTION),
    "fsdp2 lora": (lora, "fsdp2", "tangent", ATTENTION),
    "fsdp2 lora exact": (lora, "fsdp2", "exact", ATTENTION),
    "fsdp2 lora embeddings": (lora, "fsdp2", "tangent", [*ATTENTION, "embed_tokens"]),
}  # fmt: skip
