"""What is refused, with which message, and that it changes nothing; every raise of these modules is reached."""

from __future__ import annotations

import ast
import math
import re
import traceback
from pathlib import Path

import pytest
import refusals_backward
import refusals_data
import refusals_distributed
import refusals_importance
import refusals_lora
import refusals_lora_optim
import refusals_planning
import torch
from cases import BF16, assert_unchanged, random_importance, snapshot, tiny_loss, tiny_model, tiny_optimizer, train
from refusals import (
    ALPHAS,
    SHARDED,
    add_group,
    add_remainder,
    add_scales,
    anchored,
    another_optimizers_state,
    context,
    converted_after_the_first_step,
    group,
    grow_moment,
    load,
    mark_amsgrad,
    nan_recording,
    new,
    one,
    other_fingerprint,
    other_form,
    other_order,
    p,
    recorder,
    released,
    scaled,
    sparse_gradient,
    step,
    with_importance,
    wrong_gradient_shape,
)
from refusals_trainers import REFUSED as OF_TRAINERS
from torch import nn

from alr_kernels import AlrAdamW, DynamicCoeffs, Importance, _ops, _validate, layer_coefficients

ELSEWHERE = {"_validate_estimators.py"}  # what estimators refuse is in tests/test_estimators.py
SOURCES = tuple(p for p in sorted(Path(_validate.__file__).parent.glob("_validate*.py")) if p.name not in ELSEWHERE)

# what → (call with a context of model, optimizer and importance; exception; all these appear in the message, in order)
REFUSED = {
    "mode": (lambda c: new(c, mode="explicit"), ValueError, "mode.*'coupled', 'proximal'.*got 'explicit'"),
    "backend": (
        lambda c: new(c, backend="cuda"),
        ValueError, "backend.*'auto', 'reference', 'native', 'triton'.*'cuda'",
    ),
    "coeffs rule": (lambda c: new(c, c.importance, "paper"), ValueError, "'softmax'.*got 'paper'"),
    "coeffs rule unused": (lambda c: new(c, None, "paper"), ValueError, "coeffs.*'softmax'.*got 'paper'"),
    "by": (lambda c: layer_coefficients(c.importance, by="tensor"), ValueError, "by.*'block', 'module'.*'tensor'"),
    "lr type": (lambda c: new(c, lr="fast"), TypeError, "lr: expected a number, got str 'fast'"),
    "lr None": (lambda c: new(c, lr=None), TypeError, "lr: expected a number, got NoneType"),
    "lr": (lambda c: new(c, lr=-1e-3), ValueError, r"lr: expected a number in \[0.*got -0.001"),
    "lr nan": (lambda c: new(c, lr=math.nan), ValueError, "lr.*got nan"),
    "lr inf": (lambda c: new(c, lr=math.inf), ValueError, "lr.*got inf"),
    "eps": (lambda c: new(c, eps=-1e-8), ValueError, "eps.*got -1e-08"),
    "weight_decay": (lambda c: new(c, weight_decay=-0.1), ValueError, "weight_decay.*got -0.1"),
    "reg_lambda": (lambda c: new(c, reg_lambda=-1), ValueError, "reg_lambda.*got -1"),
    "reg_lambda nan": (lambda c: new(c, reg_lambda=math.nan), ValueError, "reg_lambda.*got nan"),
    "betas pair": (lambda c: new(c, betas=0.9), TypeError, "betas: expected a pair.*0.9"),
    "betas three": (lambda c: new(c, betas=(0.9, 0.9, 0.9)), TypeError, "betas: expected a pair"),
    "beta1": (lambda c: new(c, betas=(1.0, 0.9)), ValueError, r"betas\[0\].*\[0.0, 1.0\), got 1.0"),
    "beta2": (lambda c: new(c, betas=(0.9, -0.1)), ValueError, r"betas\[1\].*got -0.1"),
    "xi": (lambda c: c.optimizer.recorded_importance(0.0), ValueError, r"xi: expected a number in \[1e-30.*got 0.0"),
    "xi type": (lambda c: c.optimizer.recorded_importance("auto"), TypeError, "xi.*got str 'auto'"),
    "temperature": (lambda c: layer_coefficients(c.importance, temperature=0), ValueError, "temperature.*got 0"),
    "temperature word": (
        lambda c: layer_coefficients(c.importance, temperature="mean"),
        ValueError, "temperature.*'auto' or a number.*'mean'",
    ),
    **{
        flag: (lambda c, flag=flag: new(c, **{flag: True}), TypeError, f"{flag}=True.*{text}")
        for flag, text in {
            "amsgrad": "leave it out", "foreach": "backend=", "fused": "backend=", "differentiable": "leave it out",
        }.items()
    },
    **{
        f"{option} {value}": (
            lambda c, option=option, value=value: new(c, c.importance, **{option: value}),
            ValueError, f"{option}: expected one of {known} or such a torch dtype, got {value!r}",
        )
        for option, value, known in (
            ("importance_dtype", "int2", "'fp32', 'bf16', 'int8', 'int4'"),
            ("importance_dtype", torch.float16, "'fp32', 'bf16', 'int8', 'int4'"),
            ("importance_dtype", "rank1", "'fp32', 'bf16', 'int8', 'int4'"),
            ("importance_dtype", torch.uint8, "'fp32', 'bf16', 'int8', 'int4'"),
            ("anchor_dtype", "int8", "'fp32', 'bf16'"),
            ("anchor_dtype", torch.float64, "'fp32', 'bf16'"),
            ("state_dtype", "int4", "'fp32', 'bf16', 'int8'"),
            ("state_dtype", "torch.int8", "'fp32', 'bf16', 'int8'"),
        )
    },
    "master": (lambda c: new(c, master="fp32"), ValueError, "master.*'none', 'split', 'stochastic'.*got 'fp32'"),
    **{
        f"master {kind} of fp32": (
            lambda c, kind=kind: new(c, master=kind),
            ValueError, r"master: it has no effect.*torch.float32.*\.bfloat16\(\)",
        )
        for kind in ("split", "stochastic")
    },
    **{
        f"seed {value!r}": (
            lambda c, value=value: new(c, seed=value), ValueError, rf"seed: .* in \[0, 2\^32\), got {value!r}",
        )
        for value in (-1, 2**32, 1.5, None, "0")
    },
    "max_grad_norm": (lambda c: new(c, max_grad_norm=0), ValueError, r"max_grad_norm: .* in \(0.0, inf\), got 0"),
    "max_grad_norm inf": (lambda c: new(c, max_grad_norm=math.inf), ValueError, "max_grad_norm.*got inf"),
    "max_grad_norm type": (lambda c: new(c, max_grad_norm="1%"), TypeError, "max_grad_norm: .* number, got str '1%'"),
    "capturable": (
        lambda c: step(p(), torch.ones(2), capturable=True), ValueError, "capturable.*'w' is on the CPU.*leave it out",
    ),
    "capturable and dynamic": (
        lambda c: new(c, c.importance, DynamicCoeffs(), capturable=True), ValueError, "DynamicCoeffs.*capturable=False",
    ),
    "dynamic without importance": (lambda c: new(c, None, DynamicCoeffs()), ValueError, "coeffs.*no importance"),
    "dynamic rule": (lambda c: new(c, c.importance, DynamicCoeffs("paper")), ValueError, "'softmax'.*got 'paper'"),
    "dynamic layers": (
        lambda c: c.optimizer.set_coeffs(DynamicCoeffs({"head": 1.0})), ValueError, "coeffs.*missing 'embed'",
    ),
    "every": (lambda c: DynamicCoeffs(every=0), ValueError, "every: expected an integer ≥ 1, got 0"),
    "every type": (lambda c: DynamicCoeffs(every=2.5), ValueError, "every: expected an integer ≥ 1, got 2.5"),
    "rate": (lambda c: DynamicCoeffs(rate=0.0), ValueError, r"rate: .*\(0.0, 1.0.*got 0.0"),
    "rate above": (lambda c: DynamicCoeffs(rate=1.5), ValueError, "rate.*got 1.5"),
    "max_change": (lambda c: DynamicCoeffs(max_change=1.0), ValueError, r"max_change: .*\(1.0, inf\), got 1.0"),
    "importance_dtype without importance": (
        lambda c: new(c, importance_dtype="int8"), ValueError, "importance_dtype.*no effect.*no importance",
    ),
    "anchor_dtype without importance": (
        lambda c: new(c, anchor_dtype="bf16"), ValueError, "anchor_dtype.*no effect.*no importance",
    ),
    "stats off": (lambda c: c.optimizer.stats(), RuntimeError, "stats.*stats=True and take a step"),
    "stats before a step": (lambda c: new(c, stats=True).stats(), RuntimeError, "stats.*take a step"),
    "unknown option": (lambda c: new(c, reg_lamda=1.0), TypeError, r"'reg_lamda'.*help\(AlrAdamW\)"),
    "group flag": (lambda c: group(c, fused=True), TypeError, "fused=True.*backend="),
    "group misspelt": (lambda c: group(c, weight_decya=0.1), TypeError, "'weight_decya'; did you mean 'weight_decay'"),
    "group lr": (lambda c: group(c, lr=-1), ValueError, "lr.*got -1"),
    "group dtype": (
        lambda c: c.optimizer.add_param_group({"params": [("n", p(dtype=torch.int64))]}),
        TypeError, "'n'.*expected dtype float32.*got torch.int64.*freeze it or convert it",
    ),
    "complex": (lambda c: one(param=p(dtype=torch.complex64)), TypeError, "'w'.*complex64.*view_as_real"),
    "integer": (
        lambda c: one(param=p(dtype=torch.int32)),
        TypeError, "'w': expected dtype float32.*got torch.int32.*freeze",
    ),
    "sparse parameter": (
        lambda c: one(param=nn.Parameter(torch.eye(2).to_sparse())),
        TypeError, "'w': expected a strided tensor.*sparse_coo",
    ),
    "same tensor twice": (
        lambda c: AlrAdamW([{"params": [("a", t := p())]}, {"params": [("b", t)]}]),
        ValueError, "more than one parameter group|'b'.*'a'",
    ),
    "same tensor twice in a group": (
        lambda c: AlrAdamW([("a", t := p()), ("b", t)]),
        ValueError, r"'b' is the same tensor as 'a'.*named_parameters\(\)",
    ),
    "names coincide": (lambda c: AlrAdamW([("w", p()), ("module.w", p())]), ValueError, "two parameters.*'w'.*rename"),
    "artifact names coincide": (
        lambda c: Importance({"w": torch.ones(1), "module.w": torch.ones(1)}), ValueError, "'w'.*rename",
    ),
    "sparse gradient": (sparse_gradient, RuntimeError, "'weight'.*sparse gradients.*sparse=False"),
    "gradient shape": (wrong_gradient_shape, RuntimeError, r"'head.weight'.*shape \(1, 8\), expected \(2, 2\)"),
    "curvature": (
        lambda c: step(p(), torch.ones(2), importance={"w": torch.tensor([0.0, 1e-10])}, reg_lambda=1e30),
        ValueError, "'w'.*more than float32 holds.*reg_lambda",
    ),
    "dtype changed": (converted_after_the_first_step, RuntimeError, "'head.bias'.*bfloat16.*float32.*new optimizer"),
    "norm": (
        lambda c: layer_coefficients({"a.w": torch.full((2,), 1e200, dtype=torch.float64)}),
        ValueError, "finite norm in layer 'a'.*rescale",
    ),
    "state order": (lambda c: load(c, other_order), ValueError, "expected parameter .* where it has .*order"),
    "state of another optimizer": (
        lambda c: load(c, another_optimizers_state), ValueError, "exp_avg.*momentum_buffer.*another optimizer",
    ),
    "state of a split master": (
        lambda c: load(c, add_remainder), ValueError, "parameter 0.*master='split'.*has 'none'.*construct it with",
    ),
    "state form": (lambda c: load(c, other_form), ValueError, "saved with mode='coupled'.*has mode='proximal'.*same"),
    "meta": (lambda c: step(nn.Parameter(torch.ones(2, device="meta"))), RuntimeError, "'w'.*meta.*materialise"),
    "overlap": (
        lambda c: step(nn.Parameter(torch.ones(1).expand(3))),
        RuntimeError, r"'w'.*\(0,\).*share memory.*contiguous",
    ),
    "partial overlap": (
        lambda c: step(nn.Parameter(torch.ones(10).as_strided((3, 3), (1, 1)))),
        RuntimeError, r"'w'.*\(1, 1\).*share memory.*contiguous",
    ),
    "importance no tensor": (
        with_importance("embed.bias", [1.0] * 8),
        TypeError, "'embed.bias'.*floating-point.*got list",
    ),
    "importance integer": (
        with_importance("embed.bias", torch.ones(8, dtype=torch.int64)),
        TypeError, "'embed.bias'.*floating-point.*torch.int64",
    ),
    "importance nan": (
        with_importance("embed.bias", torch.full((8,), math.nan)),
        ValueError, "'embed.bias'.*finite.*nan.*record it again",
    ),
    "importance inf": (
        with_importance("embed.bias", torch.full((8,), math.inf)),
        ValueError, "'embed.bias'.*finite.*inf",
    ),
    "importance negative": (
        with_importance("embed.bias", torch.tensor([1.0] * 7 + [-2.0])),
        ValueError, "'embed.bias'.*≥ 0.*-2.*recorded_importance",
    ),
    "importance shape": (
        with_importance("embed.bias", torch.ones(9)),
        ValueError, r"'embed.bias': expected shape \(8,\).*got \(9,\).*another model",
    ),
    "importance names": (
        with_importance("elsewhere", torch.ones(9)),
        ValueError, r"1 of its entries match no parameter: 'elsewhere'.*select\(",
    ),
    "importance for unnamed": (
        lambda c: AlrAdamW(c.model.parameters(), c.importance),
        ValueError, r"importance.*named parameters.*named_parameters\(\)",
    ),
    "importance length": (lambda c: new(c, [torch.ones(8, 4)]), ValueError, "importance.*sequence of 8.*got 1"),
    "importance path": (lambda c: new(c, "i.safetensors"), TypeError, "importance: expected.*got str.*Importance.load"),
    "importance type": (lambda c: new(c, 3.0), TypeError, "importance: expected an Importance.*got float"),
    "importance zero": (
        lambda c: new(c, {n: 0 * t for n, t in c.importance.items()}), ValueError, "one positive.*record=True.*None",
    ),
    "importance empty": (lambda c: new(c, {}), ValueError, "at least one positive value"),
    "coefficients type": (
        lambda c: c.optimizer.set_coeffs([1.0]),
        TypeError, "coeffs.*mapping layer → number, got list",
    ),
    "coefficients missing": (
        lambda c: c.optimizer.set_coeffs({"head": 1}),
        ValueError, "missing 'embed'.*layer_coefficients",
    ),
    "coefficients unknown": (lambda c: c.optimizer.set_coeffs(ALPHAS | {"x": 1}), ValueError, "unknown 'x'"),
    "coefficients negative": (
        lambda c: c.optimizer.set_coeffs(ALPHAS | {"head": -1}),
        ValueError, r"coeffs\['head'\].*got -1",
    ),
    "coefficients without importance": (lambda c: new(c, None, ALPHAS), ValueError, "coeffs.*no effect.*no importance"),
    "set_coeffs without importance": (lambda c: new(c).set_coeffs("uniform"), ValueError, "set_coeffs.*no importance"),
    "start_phase coefficients without importance": (
        lambda c: new(c).start_phase(coeffs="uniform"), ValueError, "coeffs.*importance",
    ),
    "anchor without importance": (
        lambda c: new(c, anchor={"head.bias": torch.ones(1)}),
        ValueError, "anchor.*no effect",
    ),
    "anchor missing": (lambda c: anchored(c, **{"head.bias": None}), ValueError, "anchor.*missing 'head.bias'"),
    "anchor extra": (lambda c: anchored(c, x=torch.ones(1)), ValueError, "anchor.*not penalised 'x'"),
    "anchor shape": (
        lambda c: anchored(c, **{"head.bias": torch.ones(3)}), ValueError, r"anchor of 'head.bias'.*\(1,\), got \(3,\)",
    ),
    "anchor nan": (
        lambda c: anchored(c, **{"head.bias": torch.full((1,), math.nan)}), ValueError, "anchor of 'head.bias'.*finite",
    ),
    "start_phase importance": (
        lambda c: c.optimizer.start_phase({"head.bias": torch.ones(4)}), ValueError, r"'head.bias'.*\(1,\).*\(4,\)",
    ),
    "start_phase coefficients": (
        lambda c: c.optimizer.start_phase(c.importance, {"x": 1.0}), ValueError, "unknown 'x'",
    ),
    "non-finite recording": (nan_recording, ValueError, r"1 non-finite element\(s\) in 'w'.*allow_nonfinite=True"),
    "not recording": (lambda c: new(c).recorded_importance(), RuntimeError, "does not record.*record=True"),
    "nothing recorded": (lambda c: new(c, record=True).recorded_importance(), RuntimeError, "no step"),
    "recorder before a step": (lambda c: recorder(c)[1].finalise(), RuntimeError, "no step"),
    "state keys": (
        lambda c: c.optimizer.load_state_dict({"a": 1}),
        ValueError, "keys 'state' and 'param_groups', got 'a'",
    ),
    "state groups": (lambda c: load(c, add_group), ValueError, r"\[8\].*\[8, 0\].*groups it was saved with"),
    "state amsgrad": (lambda c: load(c, mark_amsgrad), ValueError, "amsgrad"),
    "state shape": (lambda c: load(c, grow_moment), ValueError, r"exp_avg of parameter 0.*\(9,\).*\(8, 4\)"),
    "state scales": (lambda c: load(c, add_scales), ValueError, r"exp_avg_scale of parameter 0.*\(8, 3\).*\(8, 0\)"),
    "state fingerprint": (
        lambda c: load(c, other_fingerprint),
        ValueError, "importance 0{16}.*this optimizer has.*same importance",
    ),
    "recorder released": (released, RuntimeError, r"released every gradient.*AlrAdamW\(record=True\)"),
    "recorder scaled": (scaled, RuntimeError, r"loss scale.*scaler\.unscale_"),
    "backend that cannot": (
        lambda c: one(param=p(dtype=torch.float64), backend="native"), _ops.BackendUnavailableError,
        "backend='native'.*float64.*reference.*auto",
    ),
}  # fmt: skip
OTHERS = (refusals_data, refusals_importance, refusals_lora, refusals_lora_optim, refusals_planning)
for module in (refusals_backward, refusals_distributed, *OTHERS):
    REFUSED |= module.REFUSED
REFUSED |= SHARDED | OF_TRAINERS


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_refused_with_a_message_and_without_a_trace(what):
    call, error, message = REFUSED[what]
    c = context()
    before = snapshot(c.optimizer)
    with pytest.raises(error) as caught:
        call(c)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert_unchanged(c.optimizer, before)
    train(c.model, c.optimizer)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_every_raise_is_reached():
    reached = set()
    for call, *_ in REFUSED.values():
        try:
            call(context())
        except Exception as caught:  # another error than expected is for the test above
            frames = traceback.extract_tb(caught.__traceback__)
            reached |= {(frame.filename, frame.lineno) for frame in frames}
    for source in SOURCES:
        raises = [node for node in ast.walk(ast.parse(source.read_text("utf-8"))) if isinstance(node, ast.Raise)]
        assert raises
        missed = [
            node.lineno
            for node in raises
            if not reached & {(str(source), line) for line in range(node.lineno, node.end_lineno + 1)}
        ]
        assert not missed, f"no case reaches the raise in line(s) {missed} of {source.name}"


def test_a_step_refused_at_its_first_call_binds_no_anchor():
    """The message of step() promises that nothing was changed: the anchor is taken by the first step that happens."""
    model = tiny_model()
    optimizer = tiny_optimizer(model, record=True)
    tiny_loss(model).backward()
    kept = model.head.weight.data
    model.head.weight.data = torch.ones(2, 2)
    with pytest.raises((RuntimeError, ValueError), match=r"head\.weight"):
        optimizer.step()
    model.head.weight.data = kept
    with torch.no_grad():
        model.embed.weight.add_(1.0)  # a checkpoint is loaded, say
    moved = model.embed.weight.detach().clone()
    optimizer.step()
    assert torch.equal(optimizer.state[model.embed.weight]["anchor"], moved)


def test_no_gradient_at_all_is_told_in_one_process():
    with pytest.warns(RuntimeWarning, match=r"none of the 1 parameters \('w'\) .*call backward\(\)") as told:
        one().step()
    assert told[0].filename == __file__


def test_a_master_needs_one_bf16_parameter():
    """The others of a mixed model are stepped as they are."""
    for kind in ("split", "stochastic"):
        AlrAdamW([("a", p()), ("b", p(dtype=BF16))], master=kind)


def test_recording_needs_no_importance_to_say_how_it_will_be_kept():
    """The next phase brings it: start_phase(recorded_importance())."""
    assert "importance int4, anchor bf16" in repr(one(record=True, importance_dtype="int4", anchor_dtype="bf16"))


def test_a_users_own_group_keys_are_kept():
    """Schedulers and frameworks keep their own keys in groups."""
    optimizer = AlrAdamW([{"params": [("w", p())], "lr": 0.1, "swa_lr": 0.2, "note": "mine"}])
    assert optimizer.param_groups[0]["note"] == "mine"


def test_long_lists_of_names_are_shortened():
    model = nn.ModuleDict({f"m{i:02d}": nn.Linear(1, 1) for i in range(20)})
    with pytest.raises(ValueError, match=r"40 of its entries match no parameter: 'm00.bias'.* and 35 more"):
        AlrAdamW([("w", p())], random_importance(model))
