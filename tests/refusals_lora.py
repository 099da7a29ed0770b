"""What lora_pairs refuses: part of the table of tests/test_validation.py."""

from __future__ import annotations

import sys
from unittest import mock

import peft
import torch
from lora_models import MIXED, Mixed, adapted, config, llama
from peft.tuners.lora import LoraLayer
from refusals import p
from torch import nn

from alr_kernels.lora import LoraPairs, lora_pairs


class Strange(nn.Module, LoraLayer):
    """A LoRA layer that nobody knows."""


def q(model=None, **options):
    return adapted(llama(num_hidden_layers=1) if model is None else model, ["q_proj"], **options)


def other(method, **options):
    """Pairs of a model that another of PEFT's methods adapts."""
    return lora_pairs(peft.get_peft_model(llama(num_hidden_layers=1), method(**options)))


def both_tuners():
    model = peft.get_peft_model(llama(num_hidden_layers=1), config(["q_proj"]), mixed=True)
    model.add_adapter("second", peft.LoHaConfig(target_modules=["v_proj"], r=2, alpha=2))
    model.set_adapter(["default", "second"])
    return lora_pairs(model)


def mixed(targets, change, **options):
    """Pairs of a model of every kind of layer, changed before it is adapted."""
    model = Mixed()
    change(model)
    return lora_pairs(adapted(model, targets, **options))


def replace(name, module):
    return lambda model: setattr(model, name, module)


def changed(change, model=None, **options):
    """Pairs of an adapted model with its one LoRA layer changed."""
    model = q() if model is None else model
    for module in model.modules():
        if isinstance(module, LoraLayer):
            change(module)
    return lora_pairs(model, **options)


def scaled(value):
    return changed(lambda module: module.scaling.update(default=value))


def attention():
    return lora_pairs(adapted(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), ["attention"]))


def without_peft():
    model = q()
    with mock.patch.dict(sys.modules, {"peft.tuners.lora": None}):
        lora_pairs(model)


def x_lora():
    model = q()
    model.peft_config["default"].peft_type = peft.PeftType.XLORA
    return lora_pairs(model)


def frozen():
    return lora_pairs(q().requires_grad_(False))


def merged():
    model = q()
    model.merge_adapter()
    return lora_pairs(model)


def trained_base():
    model = q()
    for name, param in model.named_parameters():
        if "q_proj.base_layer" in name:
            param.requires_grad_(True)
    return lora_pairs(model)


def tied(**options):
    model = llama(num_hidden_layers=1, tie_word_embeddings=True)
    return lora_pairs(adapted(model, ["embed_tokens", "lm_head"], **options))


def experts():
    """target_parameters of a module that holds its parameter itself."""
    model = Mixed()
    model.experts = nn.ParameterDict({"weight": torch.ones(2, 4, 3)})
    model.forward = model.linear.forward
    made = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    return lora_pairs(peft.get_peft_model(model, made))


def row(name="w", down=None, up=None, scaling=1.0):
    return name, p(2, 3) if down is None else down, p(4, 2) if up is None else up, scaling


def one(*args, **options):
    return lora_pairs([row(*args, **options)])


TARGET = {"target_modules": ["q_proj"]}
TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
FEW_RANKS = TARGET | {"target_r": 1, "init_r": 2, "total_step": 10}
ADAPTED = "base_model.model.model.layers.0.self_attn.q_proj"

REFUSED = {
    "lora estimator": (
        lambda c: lora_pairs(q(), estimator="fisher"),
        ValueError, "estimator: expected one of 'tangent', 'factored', 'exact', got 'fisher'",
    ),
    "lora preset": (lambda c: lora_pairs([row()], preset="papers"), ValueError, "preset.*'paper', None.*'papers'"),
    "lora clamp": (lambda c: LoraPairs([], clamp="never"), ValueError, "clamp: expected one of 'end', 'step'"),
    "lora origin": (lambda c: LoraPairs([], origin="end"), ValueError, "origin: expected one of 'start', 'zero'"),
    "lora preset and exact": (
        lambda c: lora_pairs(q(), estimator="exact", preset="paper"), ValueError, "'paper' sets.*'factored'.*leave one",
    ),
    "lora without peft": (lambda c: without_peft(), ImportError, "needs PEFT.*pip install peft.*tuples"),
    "lora of a string": (lambda c: lora_pairs("model"), TypeError, "expected a model.*iterable.*got str"),
    "lora of nothing": (lambda c: lora_pairs(None), TypeError, "got NoneType"),
    "lora of a mapping": (lambda c: lora_pairs({"w": p(2)}), TypeError, "got dict"),
    "lora of triples": (lambda c: lora_pairs([row()[:3]]), TypeError, r"pair 0: expected \(name, A, B, sc.*got tuple"),
    "lora of another order": (
        lambda c: lora_pairs([row(), (p(2), p(2), "w", 1)]), TypeError, r"pair 1.*got \(Parameter, Parameter, str, int",
    ),
    "lora adapter of tuples": (lambda c: lora_pairs([row()], "a"), ValueError, "adapter.*no effect.*'a'"),
    "lora adapter": (
        lambda c: lora_pairs(q(), "english"), ValueError, "adapter: expected one of 'default', got 'english'",
    ),
    "lora adapter type": (lambda c: lora_pairs(q(), 0), ValueError, "adapter: expected one of 'default', got 0"),
    "lora of a bare model": (
        lambda c: lora_pairs(c.model), ValueError, "LoRA layers, got .* with no adapter.*get_peft_model.*without lora=",
    ),
    "lora of LoHa": (lambda c: other(peft.LoHaConfig, **TARGET), ValueError, "got PeftModel with PEFT's 'LOHA'"),
    "lora of LoKr": (lambda c: other(peft.LoKrConfig, **TARGET), ValueError, "PEFT's 'LOKR'"),
    "lora of VeRA": (lambda c: other(peft.VeraConfig, **TARGET, r=2), ValueError, "PEFT's 'VERA'"),
    "lora of IA3": (
        lambda c: other(peft.IA3Config, **TARGET, feedforward_modules=[]), ValueError, "PEFT's 'IA3'",
    ),
    "lora of OFT": (lambda c: other(peft.OFTConfig, **TARGET, oft_block_size=4, r=0), ValueError, "PEFT's 'OFT'"),
    "lora of prompts": (
        lambda c: other(peft.PromptTuningConfig, **TOKENS), ValueError, "PEFT's 'PROMPT_TUNING'",
    ),
    "lora of X-LoRA": (lambda c: x_lora(), ValueError, "X-LoRA.*single LoRA adapter"),
    "lora of two methods": (
        lambda c: both_tuners(), ValueError, "'.*v_proj' is a trainable peft.tuners.loha.*no LoRA.*freeze",
    ),
    "lora of AdaLoRA": (
        lambda c: other(peft.AdaLoraConfig, **FEW_RANKS), ValueError, f"'{ADAPTED}'.*AdaLoRA.*use a LoraConfig",
    ),
    "lora of parameters": (lambda c: experts(), ValueError, "experts'.*target_parameters.*target_modules instead"),
    "lora of attention": (
        lambda c: attention(), ValueError, "attention'.*MultiheadAttention.*leave it out",
    ),
    "lora of an unknown layer": (
        lambda c: changed(lambda module: setattr(module, "__class__", Strange)),
        ValueError, f"'{ADAPTED}'.*is a Strange.*not known.*tuples",
    ),
    "lora of DoRA": (
        lambda c: lora_pairs(q(use_dora=True)), ValueError, rf"'{ADAPTED}' \(adapter 'default'\) uses DoRA.*use_dora=F",
    ),
    "lora of DoRA's embedding": (
        lambda c: mixed(["table"], lambda model: None, use_dora=True), ValueError, "table'.*DoRA",
    ),
    "lora of aLoRA": (
        lambda c: lora_pairs(q(alora_invocation_tokens=[1], task_type="CAUSAL_LM")),
        ValueError, "variant ALoraLinearVariant.*plain LoRA",
    ),
    "lora of MiCA": (
        lambda c: lora_pairs(q(init_lora_weights="mica")), ValueError, "variant MiCALinearVariant.*plain LoRA",
    ),
    "lora of groups": (
        lambda c: mixed(["grouped"], replace("grouped", nn.Conv2d(4, 4, 1, groups=2))),
        ValueError, "grouped'.*groups=2.*groups=1 only",
    ),
    "lora of dilation": (
        lambda c: mixed(["line"], replace("line", nn.Conv1d(3, 4, 3, dilation=2, padding="same"))),
        ValueError, r"line'.*dilation=\(2,\).*leave it out",
    ),
    "lora of circles": (
        lambda c: mixed(["line"], replace("line", nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"))),
        ValueError, "line'.*padding_mode='circular'",
    ),
    "lora of max_norm": (
        lambda c: mixed(["table"], replace("table", nn.Embedding(5, 4, max_norm=1.0))),
        ValueError, "table'.*max_norm, which rewrites A.*max_norm=None",
    ),
    "lora merged": (lambda c: merged(), ValueError, f"'{ADAPTED}'.*is merged.*unmerge_adapter"),
    "lora frozen": (lambda c: frozen(), ValueError, "trainable factor, got none in adapter.*'default'.*set_adapter"),
    "lora frozen tuples": (lambda c: lora_pairs([]), ValueError, "trainable factor, got none in the tuples"),
    "lora scaling type": (lambda c: one(scaling="big"), TypeError, "scaling of 'w': expected a number, got str 'big'"),
    "lora scaling zero": (lambda c: scaled(0.0), ValueError, "scaling of 'model.*q_proj.weight'.*> 0, got 0.0"),
    "lora scaling negative": (lambda c: one(scaling=-1), ValueError, "scaling of 'w'.*> 0, got -1"),
    "lora scaling inf": (lambda c: one(scaling=float("inf")), ValueError, "scaling of 'w'.*finite.*got inf"),
    "lora scaling nan": (lambda c: one(scaling=float("nan")), ValueError, "scaling of 'w'.*finite.*got nan"),
    "lora alpha zero": (lambda c: lora_pairs(q(lora_alpha=0)), ValueError, "got 0.0.*lora_alpha > 0"),
    "lora integers": (
        lambda c: one(up=p(4, 2, dtype=torch.int64)), TypeError, "factor B of 'w'.*float32.*got torch.int64",
    ),
    "lora no parameter": (
        lambda c: one(down=p(2, 3) * 2), TypeError, "factor A of 'w'.*leaf.*is_leaf=False.*the parameter itself",
    ),
    "lora dtypes": (
        lambda c: one(up=p(4, 2, dtype=torch.bfloat16)),
        ValueError, "'w'.*one dtype.*A torch.float32.*B torch.bfloat16.*convert or move",
    ),
    "lora devices": (
        lambda c: one(up=nn.Parameter(torch.ones(4, 2, device="meta"))), ValueError, "A .* on cpu and B .* on meta",
    ),
    "lora ranks": (
        lambda c: one(up=p(4, 3)), ValueError, r"A \[rank, in\] and B \[out, rank\], got A \(2, 3\) and B \(4, 3\)",
    ),
    "lora dimensions": (
        lambda c: one(down=p(2, 3, 1, 1), up=p(4, 2, 1, 1)), ValueError, r"got A \(2, 3, 1, 1\) and B \(4, 2, 1, 1\)",
    ),
    "lora features": (
        lambda c: changed(lambda module: setattr(module, "in_features", 15)),
        ValueError, r"A \[rank, in = 15\] and B \[out = 16, rank\], got A \(2, 16\).*sharded",
    ),
    "lora channels last": (
        lambda c: lora_pairs(adapted(nn.Sequential(nn.Conv2d(3, 4, 2)), ["0"]).to(memory_format=torch.channels_last)),
        ValueError, "factor A of '0.weight'.*contiguous memory, got strides.*contiguous_format",
    ),
    "lora one factor twice": (
        lambda c: lora_pairs([row("a", down := p(2, 3)), row("b", down)]), ValueError,
        "factor A of 'b' and factor A of 'a' are the same memory.*each pair its own",
    ),
    "lora one memory twice": (
        lambda c: lora_pairs([row("a", down := p(2, 3)), row("b", p(2, 4), nn.Parameter(down.T))]), ValueError,
        "factor B of 'b' and factor A of 'a' are the same memory",
    ),
    "lora tied weights": (
        lambda c: tied(), ValueError, "'.*embed_tokens' and '.*lm_head' share one base weight.*one of them only",
    ),
    "lora tied adapters": (lambda c: tied(ensure_weight_tying=True), ValueError, "share one base weight"),
    "lora names": (lambda c: lora_pairs([row(), row()]), ValueError, "called 'w' in importance; rename"),
    "lora wrapped names": (lambda c: lora_pairs([row("module.w"), row()]), ValueError, "called 'w'"),
    "lora and a trained base": (
        lambda c: trained_base(), ValueError, "called 'model.layers.0.self_attn.q_proj.weight'.*freeze the base weight",
    ),
    "exact of tuples": (
        lambda c: lora_pairs([row()], estimator="exact"), ValueError, "'exact'.*'w' comes as tensors.*tangent",
    ),
    "exact of an embedding": (
        lambda c: lora_pairs(adapted(Mixed(), MIXED), estimator="exact"),
        ValueError, "'table.weight' is an embedding's.*tangent",
    ),
    "exact of a convolution": (
        lambda c: lora_pairs(adapted(Mixed(), ["linear", "point"]), estimator="exact"),
        ValueError, "'point.weight' is a convolution's.*tangent",
    ),
}  # fmt: skip
