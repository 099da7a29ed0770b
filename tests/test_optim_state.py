"""What state_dict keeps: resuming is bit-identical, dtypes survive, and a state that does not fit changes nothing."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    BF16,
    F32,
    MODES,
    assert_same_state,
    assert_unchanged,
    members,
    random_importance,
    same_bits,
    set_grads,
    snapshot,
    tiny_model,
    tiny_optimizer,
    train,
    ulp,
    within,
)

from alr_kernels import AlrAdamW

modes = pytest.mark.parametrize("mode", MODES)
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=("float32", "bfloat16"))


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def run(mode, dtype, steps, **options):
    model = tiny_model(dtype=dtype)
    optimizer = tiny_optimizer(model, mode=mode, record=True, **options)
    train(model, optimizer, steps)
    return model, optimizer


def test_state_of_torch_adamw_loads_and_goes_on_alike():
    ours, theirs = tiny_model(), tiny_model()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **options)
    train(theirs, reference, 5)
    ours.load_state_dict(theirs.state_dict())
    optimizer = AlrAdamW(ours.named_parameters(), random_importance(ours), reg_lambda=0.0)
    optimizer.load_state_dict(reference.state_dict())
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float(optimizer.state[param]["step"]) == 5
        assert same_bits(optimizer.state[param]["exp_avg"], reference.state[other]["exp_avg"])
        assert same_bits(optimizer.state[param]["exp_avg_sq"], reference.state[other]["exp_avg_sq"])
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in options} == options
    assert group["reg_lambda"] == 0.0
    assert not {"amsgrad", "foreach", "fused"} & set(group)
    before = [p.detach().clone() for p in ours.parameters()]
    for each in (optimizer, reference):
        set_grads(each, 6)
        each.step()
    for got, expected, was in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        unit = ulp(was.double().abs().clamp(min=1e-2), F32)
        within(float(((got - expected).detach().double().abs() / unit).max()), "torch step 1")


@dtypes
def test_dtypes_survive_saving(tmp_path, dtype):
    _, optimizer = run("proximal", dtype, 3)
    model = tiny_model(dtype=dtype)
    loaded = tiny_optimizer(model, record=True)
    loaded.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path / "state.pt"))
    for param, other in zip(members(optimizer), members(loaded), strict=True):
        for key, value in optimizer.state[param].items():
            assert loaded.state[other][key].dtype == value.dtype == (dtype if key in ("anchor", "start") else F32), key
            assert same_bits(loaded.state[other][key], value), key


@dtypes
@modes
def test_resuming_is_bit_identical(tmp_path, mode, dtype):
    """Saved in the middle of a recording, with the penalty on; weights, moments, anchors and ω go on."""
    model, optimizer = run(mode, dtype, 3, coeffs="proportional")
    optimizer.set_coeffs("uniform")  # the α in use is saved, not the constructor's
    optimizer.param_groups[0]["lr"] = 5e-3
    other = tiny_model(seed=1, dtype=dtype)
    other.load_state_dict(through_a_file(model.state_dict(), tmp_path / "model.pt"))
    resumed = tiny_optimizer(other, mode=mode, record=True, coeffs="proportional")
    resumed.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path / "state.pt"))
    train(model, optimizer, 4, first=3)
    train(other, resumed, 4, first=3)
    assert_same_state(resumed, optimizer)
    assert resumed.coeffs == optimizer.coeffs
    assert float(resumed.penalty()) == float(optimizer.penalty()) > 0
    first, second = resumed.recorded_importance(), optimizer.recorded_importance()
    assert first.steps == second.steps == 7
    assert first.stats == second.stats


RESUME = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from cases import BF16, F32, tiny_model, tiny_optimizer, train
for mode in ("coupled", "proximal"):
    for dtype in (F32, BF16):
        stem = f"{sys.argv[1]}/{mode}-{dtype}"
        model = tiny_model(seed=5, dtype=dtype)
        model.load_state_dict(torch.load(stem + "-model.pt", weights_only=True))
        optimizer = tiny_optimizer(model, mode=mode, record=True)
        optimizer.load_state_dict(torch.load(stem + "-state.pt", weights_only=True))
        train(model, optimizer, 4, first=3)
        torch.save({"model": model.state_dict(), "state": optimizer.state_dict()}, stem + "-end.pt")
"""


def test_resuming_in_a_fresh_process_is_bit_identical(tmp_path):
    runs = {(mode, dtype): run(mode, dtype, 3) for mode in MODES for dtype in (F32, BF16)}
    for (mode, dtype), (model, optimizer) in runs.items():
        torch.save(model.state_dict(), tmp_path / f"{mode}-{dtype}-model.pt")
        torch.save(optimizer.state_dict(), tmp_path / f"{mode}-{dtype}-state.pt")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", RESUME, str(tmp_path), str(here)],
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (mode, dtype), (model, optimizer) in runs.items():
        train(model, optimizer, 4, first=3)
        end = torch.load(tmp_path / f"{mode}-{dtype}-end.pt", weights_only=True)
        assert all(same_bits(end["model"][name], value) for name, value in model.state_dict().items())
        for key, state in optimizer.state_dict()["state"].items():
            for field, value in state.items():
                assert same_bits(end["state"]["state"][key][field], value), (mode, dtype, key, field)


def test_loaded_state_shares_no_tensor():
    _, optimizer = run("proximal", F32, 2)
    other = tiny_model()
    loaded = tiny_optimizer(other, record=True)
    saved = optimizer.state_dict()
    loaded.load_state_dict(saved)
    untouched = copy.deepcopy(optimizer)
    theirs = {t.data_ptr() for state in optimizer.state.values() for t in state.values()}
    assert not theirs & {t.data_ptr() for state in loaded.state.values() for t in state.values()}
    train(other, loaded, 2)
    assert_same_state(optimizer, untouched)
    for param in members(loaded):  # still one buffer for anchor and start
        assert loaded.state[param]["anchor"].data_ptr() == loaded.state[param]["start"].data_ptr()


def other_importance(saved):
    model = tiny_model()
    optimizer = tiny_optimizer(model, seed=2)
    train(model, optimizer)
    return optimizer.state_dict()


def with_amsgrad(saved):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    train(model, optimizer)
    return optimizer.state_dict()


def with_two_groups(saved):
    model = tiny_model()
    groups = [{"params": list(model.embed.parameters())}, {"params": list(model.head.parameters())}]
    return torch.optim.AdamW(groups).state_dict()


def with_other_shapes(saved):
    saved["state"][0]["exp_avg"] = torch.zeros(3, 3)
    return saved


def with_other_layers(saved):
    for group in saved["param_groups"]:
        group["coeffs"] = {"embed": 0.5, "elsewhere": 0.5}
        group["lr"] = 123.0
    return saved


REFUSED = {
    "another importance": (other_importance, "saved with importance [0-9a-f]{16}, this optimizer has [0-9a-f]{16}"),
    "amsgrad": (with_amsgrad, "amsgrad"),
    "number of groups": (with_two_groups, r"expected param groups of \[8\] parameters, got \[2, 2\]"),
    "shapes": (with_other_shapes, r"exp_avg of parameter 0 has shape \(3, 3\), expected \(8, 4\)"),
    "layers": (with_other_layers, "unknown 'elsewhere'"),
    "not a state_dict": (lambda saved: {"model": 1}, "expected keys 'state' and 'param_groups'"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_state_that_does_not_fit_changes_nothing(why):
    make, message = REFUSED[why]
    _, source = run("proximal", F32, 2)
    model, optimizer = run("proximal", F32, 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make(copy.deepcopy(source.state_dict())))
    assert_unchanged(optimizer, before)
    train(model, optimizer)


def test_a_value_that_differs_is_another_importance():
    """The fingerprint sees values, also two that change places."""
    model = tiny_model()
    importance = random_importance(model)
    first = AlrAdamW(model.named_parameters(), importance)
    train(model, first)
    swapped = {name: t.clone() for name, t in importance.items()}
    swapped["embed.weight"] = swapped["embed.weight"].flip(0)
    second = AlrAdamW(model.named_parameters(), swapped)
    with pytest.raises(ValueError, match="saved with importance"):
        second.load_state_dict(first.state_dict())


def test_recording_starts_where_the_saved_run_did_not_record():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    train(model, optimizer, 2)
    recording = tiny_optimizer(model, record=True)
    recording.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="no step"):
        recording.recorded_importance()
    train(model, recording)
    assert recording.recorded_importance().steps == 1
    for param in members(recording):  # the start is not the anchor any more
        assert recording.state[param]["start"].data_ptr() != recording.state[param]["anchor"].data_ptr()


def test_state_without_penalty_or_recording_is_left_out():
    model, optimizer = run("proximal", F32, 2)
    plain = AlrAdamW(model.named_parameters())
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["importance_fingerprint"] = None
    plain.load_state_dict(saved)
    assert all(set(plain.state[param]) == {"step", "exp_avg", "exp_avg_sq"} for param in members(plain))


def test_a_state_saved_before_the_first_step_resumes():
    model = tiny_model()
    other = copy.deepcopy(model)
    first, second = tiny_optimizer(model, record=True), tiny_optimizer(other, record=True)
    second.load_state_dict(first.state_dict())
    train(model, first, 2)
    train(other, second, 2)
    assert_same_state(first, second)


def test_a_given_anchor_outlives_a_plain_adamw_state():
    model = tiny_model()
    importance = random_importance(model)
    anchor = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    optimizer = AlrAdamW(model.named_parameters(), importance, anchor=anchor)
    train(model, optimizer)
    before = float(optimizer.penalty())
    assert before > 0
    plain = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(plain.state_dict())
    assert float(optimizer.penalty()) == before


def test_a_loaded_state_with_a_bad_option_is_refused_and_changes_nothing():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    train(model, optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = -5.0
    kept = optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="lr"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == kept


def test_pre_hooks_see_and_may_change_the_whole_state():
    """torch's documented way to bring a state into another order."""
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(-torch.ones(2))
    importance = {"a": torch.ones(2), "b": torch.ones(2)}
    first = AlrAdamW([("a", a), ("b", b)], importance)
    a.grad, b.grad = torch.ones(2), torch.full((2,), 3.0)
    first.step()
    second = AlrAdamW([("b", b), ("a", a)], importance)

    def by_name(optimizer, state_dict):
        (saved,), (own,) = state_dict["param_groups"], optimizer.param_groups
        order = [saved["param_names"].index(name) for name in own["param_names"]]
        state = {i: state_dict["state"][key] for i, key in enumerate(order)}
        return {"state": state, "param_groups": [{**saved, "params": [0, 1], "param_names": own["param_names"]}]}

    second.register_load_state_dict_pre_hook(by_name)
    second.load_state_dict(first.state_dict())
    for param in (a, b):
        assert torch.equal(second.state[param]["anchor"], first.state[param]["anchor"])
        assert torch.equal(second.state[param]["exp_avg"], first.state[param]["exp_avg"])


def test_lambda_of_a_run_without_importance_is_not_taken_over():
    model = tiny_model()
    recording = AlrAdamW(model.named_parameters(), record=True)
    train(model, recording)
    tuning = AlrAdamW(model.named_parameters(), random_importance(model), reg_lambda=0.05)
    tuning.load_state_dict(recording.state_dict())
    assert tuning.param_groups[0]["reg_lambda"] == 0.05
