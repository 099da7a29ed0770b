"""NLL against a float64 oracle; padding never counts; batches change nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alr_kernels.finetune import evaluation
from alr_kernels.finetune.evaluation import Losses, Nll, losses, nll, token_losses

PAD = 7


def model_of(arch="llama", dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    common = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None}
    if arch == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        built = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **sizes, initializer_range=0.5))
    else:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 4, "resid_pdrop": 0.3}
        built = transformers.GPTJForCausalLM(transformers.GPTJConfig(**common, **sizes, initializer_range=0.5))
    return built.to(dtype)


def rows(count=9, seed=0):
    """Rows of 2 to 12 tokens whose labels leave some out; PAD is also a token of the text."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(40, (2 + (5 * index) % 11,), generator=generator).tolist()
        labels = [-100 if torch.rand(1, generator=generator) < 0.3 else token for token in ids]
        made.append({"input_ids": ids, "labels": [*labels[:-1], ids[-1]]})
    return made


def collate(chosen, left=False, labels_of_padding=-100):
    longest = max(len(row["input_ids"]) for row in chosen)

    def padded(values, filler):
        gap = [filler] * (longest - len(values))
        return gap + values if left else values + gap

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], PAD) for row in chosen]),
        "labels": torch.tensor([padded(row["labels"], labels_of_padding) for row in chosen]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in chosen]),
    }


def oracle(model, row):
    """Sum and count of one row without padding: a loop over tokens, in Python's float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().numpy()
    total, count = 0.0, 0
    for place, label in enumerate(row["labels"][1:]):
        if label != -100:
            scores = logits[place]
            top = scores.max()
            total += top + math.log(sum(math.exp(score - top) for score in scores)) - scores[label]
            count += 1
    return total, count


@pytest.mark.parametrize("arch", ["llama", "gptj"])
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_against_the_oracle_row_by_row(arch, batch):
    model, data = model_of(arch, torch.float64).train(), rows()
    expected = [oracle(model.eval(), row) for row in data]
    close = 1e-12 if arch == "llama" else 1e-6  # GPT-J attends in float32, whatever its weights are
    found = losses(model.train(), data, collate, batch)
    assert found.counts.tolist() == [count for _, count in expected]
    np.testing.assert_allclose(found.sums, [total for total, _ in expected], rtol=close)
    tokens = sum(count for _, count in expected)
    assert nll(model, data, collate, batch).tokens == tokens
    assert nll(model, data, collate, batch).nll == pytest.approx(sum(t for t, _ in expected) / tokens, rel=close)
    assert model.training, "the mode is as before"


@pytest.mark.parametrize("labels_of_padding", [-100, PAD])
@pytest.mark.parametrize("left", [False, True])
def test_padding_never_counts(left, labels_of_padding):
    """Not even with labels of its own, and neither does the first token after left padding."""
    model, data = model_of().eval(), rows()
    expected = [oracle(model, row) for row in data]
    sums, counts = token_losses(model, collate(data, left, labels_of_padding))
    assert sums.dtype == torch.float64
    assert counts.tolist() == [count for _, count in expected]
    np.testing.assert_allclose(sums.numpy(), [total for total, _ in expected], rtol=1e-5)


def test_equal_to_the_models_own_loss_where_nothing_is_padded():
    model = model_of().eval()
    ids = torch.randint(40, (3, 11))
    sums, counts = token_losses(model, {"input_ids": ids, "labels": ids})
    own = float(model(input_ids=ids, labels=ids).loss.detach())
    assert float(sums.sum() / counts.sum()) == pytest.approx(own, rel=1e-6)


def test_chunks_change_nothing(monkeypatch):
    model, batch = model_of().eval(), collate(rows())
    whole = token_losses(model, batch)
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", 3 * 4 * 40)  # three tokens at a time
    assert torch.equal(token_losses(model, batch)[0], whole[0])


def test_bf16_logits_are_summed_up_in_float64():
    """A thousand tokens of about ln 40: bf16 would be off by percents, float32 logits are exact to 1e-6."""
    model = model_of(dtype=torch.bfloat16).eval()
    ids = torch.randint(40, (1, 1001))
    sums, counts = token_losses(model, {"input_ids": ids, "labels": ids})
    total, count = oracle(model, {"input_ids": ids[0].tolist(), "labels": ids[0].tolist()})
    assert counts.tolist() == [count] == [1000]
    assert float(sums) == pytest.approx(total, rel=1e-5)


def test_a_wrapped_model_and_one_that_knows_no_cache():
    model, batch = model_of().eval(), collate(rows())
    expected = token_losses(model, batch)[0]

    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    assert torch.equal(token_losses(Bare(), batch)[0], expected)
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    assert torch.equal(token_losses(wrapped, batch)[0], expected)


def test_every_batch_ticks_and_the_longest_rows_come_first():
    ticks, widths = [], []

    def noting(chosen):
        batch = collate(chosen)
        widths.append(batch["input_ids"].shape[1])
        return batch

    losses(model_of(), rows(), noting, 4, lambda: ticks.append(1))
    assert len(ticks) == 3
    assert widths == sorted(widths, reverse=True)


def test_nothing_that_counts_is_an_error():
    data = [{"input_ids": [3], "labels": [3]}]
    with pytest.raises(ValueError, match=r"no token of the 1 measured row\(s\) counts.*longer texts"):
        nll(model_of(), data, collate, 1)


def test_perplexity_and_json():
    assert Nll(math.log(40), 3).perplexity == pytest.approx(40)
    assert Nll(1000.0, 3).perplexity == math.inf
    assert Nll(1000.0, 3).as_dict() == {"nll": 1000.0, "perplexity": None, "tokens": 3}
    assert Nll(math.nan, 3).as_dict()["nll"] is None
    total = Losses(np.array([1.0, 5.0]), np.array([1, 3])).total
    assert total == Nll(1.5, 4), "tokens weigh alike, not rows"
