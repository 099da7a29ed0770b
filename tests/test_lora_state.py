"""LoRA pairs in an optimizer over time: saving, resuming, copying, phases, files, adapters that plain PEFT loads."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import MODES, assert_same_state
from test_lora_optim import NAMES, Problem, run
from test_lora_recording import OMEGA, Smooth, peft_model

from alr_kernels import AlrAdamW, Importance, lora_pairs


def twin(problem):
    other = type(problem)(problem.bias.dtype)
    for (_, to), (_, of) in zip(other.named(), problem.named(), strict=True):
        to.data.copy_(of)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_has_the_same_bits(mode, dtype, tmp_path):
    options = {"mode": mode, "record": True, "importance_dtype": "int8", "state_dtype": "int8"}
    options |= {"anchor_dtype": "bf16"}  # not that of factors
    options |= {"master": "split"} if dtype is torch.bfloat16 else {}
    problem = Problem(dtype)
    optimizer = problem.optimizer(**options)
    run(problem, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = twin(problem)
    other = resumed.optimizer(**options)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(problem, optimizer, 3, first=4)
    run(resumed, other, 3, first=4)
    assert_same_state(optimizer, other)
    first, second = optimizer.recorded_importance(), other.recorded_importance()
    assert first.content_fingerprint == second.content_fingerprint
    assert first.steps == second.steps == 6


def test_a_state_of_plain_adamw_loads():
    problem = Problem(torch.float32)
    adamw = torch.optim.AdamW(problem.named(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    run(problem, adamw, 2)
    other = twin(problem)
    optimizer = other.optimizer()
    optimizer.load_state_dict(adamw.state_dict())
    run(other, optimizer, 1, first=3)
    assert float(optimizer.penalty()) > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_on_by_themselves(copied):
    problem = Problem(torch.float32)
    optimizer = problem.optimizer(record=True)
    run(problem, optimizer, 2)
    other = copied(optimizer)
    run(problem, optimizer, 1, first=3)
    for group, same in zip(optimizer.param_groups, other.param_groups, strict=True):
        for param, twin_param in zip(group["params"], same["params"], strict=True):
            assert param is not twin_param
            twin_param.grad = param.grad.clone()
    other.step()
    assert_same_state(optimizer, other)


def test_a_recording_by_hooks_is_not_copied():
    model = peft_model()
    optimizer = AlrAdamW(model.named_parameters(), lora=lora_pairs(model, estimator="exact"), record=True)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)


def test_phases_move_the_anchor_and_start_recording_anew():
    problem = Smooth(torch.float32)
    optimizer = problem.optimizer(lr=1e-2)
    for _ in range(5):
        problem.step(optimizer)
    importance = optimizer.recorded_importance()
    optimizer.start_phase(importance)
    assert float(optimizer.penalty()) == 0
    before = problem.effective()
    for _ in range(2):
        problem.step(optimizer)
    assert float(optimizer.penalty()) > 0
    state = optimizer.state[problem.b]
    torch.testing.assert_close(2.0 * state["anchor"].double() @ optimizer.state[problem.a]["anchor"].double(), before)
    assert optimizer.recorded_steps == 2
    assert state[OMEGA].abs().sum() < importance.stats["layer.weight"].path_integral_sum


def test_a_given_anchor_is_in_factors():
    problem = Problem(torch.float64)
    anchor = {name: torch.zeros_like(param) for name, param in problem.named()}
    optimizer = problem.optimizer(anchor=anchor)
    name, a, b, s = problem.pairs[0]
    weight = problem.weights(0.7, True)[name]
    value = weight * (problem.importance[name] * (s * b @ a) ** 2).sum()
    torch.testing.assert_close(optimizer.penalty_by_layer()["layers.0.q"], value.detach())
    run(problem, optimizer, 1)
    assert not optimizer.state[a]["anchor"].any()


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8", "int4", "rank1"])
def test_importance_goes_through_a_file_into_the_next_run(kept, tmp_path):
    problem = Problem(torch.float32)
    optimizer = problem.optimizer(record=True)
    run(problem, optimizer, 3)
    optimizer.save_importance(tmp_path / "omega.safetensors", dtype=kept, xi=1e-4)
    loaded = Importance.load(tmp_path / "omega.safetensors")
    assert set(loaded) == {*NAMES, "bias"}
    assert (loaded.method, loaded.cut) == ("path_integral_tangent", 1e-8)
    direct = optimizer.recorded_importance(1e-4, dtype=kept)
    assert loaded.content_fingerprint == direct.content_fingerprint
    assert loaded.encoded(NAMES[1]).format == kept  # the others are small
    other = Problem(torch.float32, seed=1)
    again = AlrAdamW(other.named(), loaded, lora=other.pairs, lr=1e-2, reg_lambda=10.0)
    run(other, again, 3)
    assert float(again.penalty()) > 0
    assert "3 pairs in effective space" in repr(again)


def test_a_file_without_a_cut_says_none(tmp_path):
    Importance({"w": torch.ones(3)}).save(tmp_path / "x.safetensors")
    assert Importance.load(tmp_path / "x.safetensors").cut is None


def test_a_tuned_adapter_loads_in_plain_peft(tmp_path):
    peft = pytest.importorskip("peft")
    from test_lora_recording import Model

    model = peft_model()
    x, y = torch.randn(32, 20), torch.randn(32, 5)
    optimizer = AlrAdamW(model.named_parameters(), lora=lora_pairs(model), record=True, lr=1e-2)
    for phase in range(2):
        for _ in range(5):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            optimizer.step()
        if phase == 0:
            optimizer.start_phase(optimizer.recorded_importance())
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_layers_are_modules_unless_said_otherwise():
    problem = Problem(torch.float32)
    assert set(problem.optimizer(coeffs="uniform").coeffs) == {"layers.0.q", "layers.0.v", "layers.1.q", "(root)"}
    blocks = {"layers.0": 0.5, "layers.1": 0.3, "(root)": 0.2}
    assert dict(problem.optimizer(coeffs=blocks).coeffs) == blocks


def test_paper_epochs_keep_the_anchor():
    from alr_kernels.lora import paper

    problem = Smooth(torch.float32)
    pairs = lora_pairs([("layer.weight", problem.a, problem.b, 2.0)], preset="paper")
    optimizer = AlrAdamW(problem.named(), lora=pairs, record=True, **paper.OPTIONS)
    problem.step(optimizer)
    optimizer.start_phase(paper.add_epoch(optimizer))
    for _ in range(2):
        problem.step(optimizer)
    before = float(optimizer.penalty())
    paper.add_epoch(optimizer)
    assert float(optimizer.penalty()) == before > 0


def test_what_is_no_factor_is_named_as_without_peft_however_it_comes():
    model = peft_model(modules_to_save=["head"])
    pairs = lora_pairs(model)
    wanted = {"proj.weight", "head.weight", "head.bias"}
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    for params in (trained, [param for _, param in trained], [(f"odd.{name}", param) for name, param in trained]):
        optimizer = AlrAdamW(params, lora=pairs, record=True)
        for _, param in trained:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert set(optimizer.recorded_importance()) == wanted == set(pairs.importance_names)
    factors = [row for row in trained if "lora_" in row[0]]
    later = AlrAdamW(factors, lora=pairs, record=True)
    later.add_param_group({"params": [row for row in trained if "lora_" not in row[0]]})
    later.step()
    assert set(later.recorded_importance()) == wanted


def test_a_factor_that_is_not_finite_loses_its_own_importance_alone():
    problem = Problem(torch.float32)
    optimizer = problem.optimizer(record=True)
    run(problem, optimizer, 1)
    with torch.no_grad():
        problem.pairs[0][1][0, 0] = torch.nan
    run(problem, optimizer, 1, first=2)
    with pytest.raises(ValueError, match="non-finite element"):
        optimizer.recorded_importance()
    stats = optimizer.recorded_importance(allow_nonfinite=True).stats
    assert stats[NAMES[0]].nonfinite > 0
    assert stats[NAMES[2]].nonfinite == 0  # of the same stack


def test_a_skipped_step_leaves_its_statistics():
    problem = Problem(torch.float32)
    optimizer = problem.optimizer(stats=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    run(problem, optimizer, 1)
    assert not any(value for row in optimizer.stats().values() for value in row.values())
    optimizer.found_inf = torch.tensor(0.0)
    run(problem, optimizer, 2)
    before = optimizer.stats()
    optimizer.found_inf = torch.tensor(1.0)
    run(problem, optimizer, 1, first=3)
    assert optimizer.stats() == before


def test_lambda_as_a_tensor_may_be_zero():
    problem, other = Problem(torch.float32), Problem(torch.float32)
    run(problem, problem.optimizer(reg_lambda=torch.tensor(0.0), stats=True), 2)
    run(other, torch.optim.AdamW(other.named(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), 2)
    for (_, param), (_, wanted) in zip(problem.named(), other.named(), strict=True):
        torch.testing.assert_close(param, wanted, rtol=1e-6, atol=1e-7)


def test_the_penalty_is_the_same_before_and_after_binding():
    problem = Problem(torch.float32)
    anchor = {name: torch.zeros_like(param) for name, param in problem.named()}
    optimizer = problem.optimizer(anchor=anchor, importance_dtype="int4", lr=0.0)
    before = float(optimizer.penalty())
    run(problem, optimizer, 1)
    assert float(optimizer.penalty()) == pytest.approx(before, rel=1e-6)


def test_anchors_of_factors_stay_exact_through_a_resume():
    """These are large enough for ``anchor_dtype`` to act on, were they no factors."""
    a, b = (torch.nn.Parameter(torch.randn(*shape)) for shape in ((16, 512), (256, 16)))
    importance = {"w.weight": torch.rand(256, 512)}
    options = {"lora": [("w.weight", a, b, 2.0)], "anchor_dtype": "bf16"}
    optimizer = AlrAdamW([("A", a), ("B", b)], importance, **options)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    other = AlrAdamW([("A", a), ("B", b)], importance, **options)
    other.load_state_dict(optimizer.state_dict())
    for param in (a, b):
        assert torch.equal(other.state[param]["anchor"], optimizer.state[param]["anchor"])
        assert other.state[param]["anchor"].dtype is torch.float32
