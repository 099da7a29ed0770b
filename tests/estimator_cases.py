"""Small models of many kinds, their batches, and per-sample gradients in float64 by a plain loop over samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import nn

VOCABULARY = 19
SIZES = (3, 1, 4)  # of the batches: odd, one sample, another
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = COMMON | {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "use_cache": False, "head_dim": 8,
}  # fmt: skip


def causal_loss(logits, labels):
    """Mean of −log p(next token) over the labels other than −100, of one sample."""
    scores = logits[:, :-1].log_softmax(-1).flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    kept = wanted != -100
    return -scores[kept, wanted[kept]].mean()


def token_loss(logits, labels):
    kept = labels != -100
    return -logits.log_softmax(-1)[kept, labels[kept]].mean()


def sequence_loss(logits, labels):
    return -logits.log_softmax(-1)[0, labels[0]]


class Case(NamedTuple):
    """A model, what it is called with, and the loss of one sample."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict]  # of so many samples
    loss_of_one: Callable = causal_loss


def tokens(samples, length=7, *, mask=False, causal=True, seed=0):
    """Return token batches; with ``mask`` samples end at different places, and some labels are −100."""
    generator = torch.Generator().manual_seed(seed + samples)
    ids = torch.randint(VOCABULARY, (samples, length), generator=generator)
    labels = ids.clone() if causal else torch.randint(VOCABULARY, (samples, length), generator=generator)
    if not mask:
        return {"input_ids": ids, "labels": labels}
    ends = torch.arange(samples) % (length - 3) + 3
    kept = torch.arange(length) < ends[:, None]
    labels = labels.masked_fill(~kept, -100)
    labels[:, 1] = -100
    return {"input_ids": ids, "attention_mask": kept.long(), "labels": labels}


def randomised(model):
    """Return the model with weights far from their initial 0s and 1s, in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn(param.shape, generator=generator))
    return model.eval()


def llama(**changes):
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | changes))))


def gptj():
    sizes = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "n_positions": 16}
    return randomised(transformers.GPTJForCausalLM(transformers.GPTJConfig(**COMMON, **sizes, use_cache=False)))


def gpt2():
    sizes = {"n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**COMMON, **sizes, use_cache=False)))


def gemma():
    """RMSNorm of 1 + w, tied."""
    return randomised(transformers.GemmaForCausalLM(transformers.GemmaConfig(**LLAMA)))


def qwen3():
    """RMSNorm of every head."""
    return randomised(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA)))


def bert(kind):
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, num_labels=4, pad_token_id=0,
    )  # fmt: skip
    return randomised(kind(config))


def classes(samples):
    batch = tokens(samples, mask=True)
    return batch | {"labels": torch.arange(samples) % 4}


class Shared(nn.Module):
    """One Linear and one norm used twice, an embedding used twice with a padding index, a bias alone trainable."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight.requires_grad_(False)

    def forward(self, first, second, labels=None):
        a, b = self.norm(self.mix(self.embedding(first))), self.embedding(second)
        together = torch.cat([torch.tanh(a), self.norm(torch.tanh(self.mix(b)))], 1).mean(1)
        logits = self.head(together)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits, "loss": loss}


def shared():
    return randomised(Shared())


def pairs(samples):
    generator = torch.Generator().manual_seed(samples)
    first, second = torch.randint(3, (2, samples, 4), generator=generator)
    return {"first": first, "second": second[:, :3], "labels": torch.arange(samples) % 5}


CASES = {
    "llama": Case(llama, tokens),
    "padded llama": Case(llama, lambda n: tokens(n, mask=True)),
    "tied llama": Case(lambda: llama(tie_word_embeddings=True), lambda n: tokens(n, mask=True)),
    "gptj": Case(gptj, tokens),
    "gpt2": Case(gpt2, lambda n: tokens(n, mask=True)),
    "gemma": Case(gemma, tokens),
    "qwen3": Case(qwen3, tokens),
    "bert classifier": Case(lambda: bert(transformers.BertForSequenceClassification), classes, sequence_loss),
    "bert tagger": Case(
        lambda: bert(transformers.BertForTokenClassification),
        lambda n: (b := tokens(n, mask=True)) | {"labels": b["labels"].clamp(max=3)},
        token_loss,
    ),
    "bert masked": Case(
        lambda: bert(transformers.BertForMaskedLM), lambda n: tokens(n, mask=True, causal=False), token_loss
    ),
    "shared": Case(shared, pairs, sequence_loss),
}


def batches_of(case, sizes=SIZES):
    return [case.batch(size) for size in sizes]


def frozen(model, *words):
    for name, param in model.named_parameters():
        if any(word in name for word in words):
            param.requires_grad_(False)
    return model


def one(batch, n):
    return {key: value[n : n + 1] for key, value in batch.items()}


def plain_loop(model, batches, value_of_one, power=2):
    """Return name → mean_n |g_n|^power in float64; ``value_of_one(model, batch)`` of one sample, 0-dim."""
    wide = copy.deepcopy(model).double().eval()
    params = {name: param for name, param in wide.named_parameters() if param.requires_grad}
    sums = {name: torch.zeros_like(param) for name, param in params.items()}
    count = 0
    for batch in batches:
        for n in range(len(next(iter(batch.values())))):
            value = value_of_one(wide, one(batch, n))
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for name, grad in zip(params, grads, strict=True):
                if grad is not None:
                    sums[name] += grad.abs() ** power
            count += 1
    return {name: total / count for name, total in sums.items()}


def own_loss(case):
    """Return the loss of one sample from the logits, without the model's own loss."""

    def value(model, batch):
        outputs = model(**{key: item for key, item in batch.items() if key != "labels"})
        return case.loss_of_one(outputs["logits"].double(), batch["labels"])

    return value


def assert_close(got, expected, *, rtol=1e-5, elementwise=1e-3, power=2):
    """Compare by each tensor's maximum, and element by element where they are above 1 % of it."""
    assert set(got) == set(expected)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        wide = got[name].double()
        assert wide.shape == value.shape, name
        if float(value.max()) <= 1e-6**power * largest:  # zero but for rounding
            assert float(wide.max()) <= 1e-5**power * largest, name
            continue
        error = (wide - value).abs()
        assert float(error.max()) <= rtol * float(value.max()), f"{name}: {error.max() / value.max():.3g}"
        large = value > 0.01 * value.max()
        relative = (error / value)[large].max()
        assert float(relative) <= elementwise, f"{name}: element-wise {relative:.3g}"


# ---------------------------------------------------------------- a network of points, with a loss of the user's


def mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def squared(model, batch):
    """One number a sample."""
    return (model(batch["x"]) - batch["y"]).square().sum(1)


def points(sizes=SIZES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(size, 5, generator=generator), "y": torch.randn(size, 3, generator=generator)}
        for size in sizes
    ]


def wide(loss):
    return lambda model, batch: loss(model, {key: value.double() for key, value in batch.items()}).sum()


class Scale(nn.Module):
    """A kind of layer without a rule."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((5,), 1.5))

    def forward(self, x):
        return x * self.scale
