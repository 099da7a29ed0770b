"""What a resumed run needs: state_dict and load_state_dict, pickling and copying."""

from __future__ import annotations

from typing import Any

from . import _validate, _validate_lora, compiled
from . import saved as saved_form
from .readings import Readings

OWN_ATTRIBUTES = (  # what pickle and deepcopy must keep besides torch's own
    *("mode", "normalize", "record", "backend", "precise", "max_grad_norm", "capturable", "_grad_norm"),
    *("_slots", "_penalty", "_anchor", "_bound", "_recorded_steps", "_coeffs_choice", "_storage", "_seed"),
    *("_balance", "_version", "_gathers_stats", "_device_steps", "_space"),
)


class Saving(Readings):
    """The part of :class:`AlrAdamW` that is saved and loaded."""

    @property
    def _lora_form(self) -> str | None:
        return self._space.form if self._space is not None and self.record else None

    @property
    def _penalty_form(self) -> str:
        return f"mode={self.mode!r}, normalize={self.normalize}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the importance file: moments, anchor, start, ω, α, a fingerprint."""
        saved = super().state_dict()
        if self._penalty is not None and self._balance is not None:
            self._penalty.coeffs = self._balance.coeffs()
        balance = self._balance.state() if self._balance else None
        extra = saved_form.extras(
            self._penalty, self._penalty_form, self._coeffs_choice, self.recorded_steps, balance, self._lora_form
        )
        saved["state"] = {
            index: saved_form.wrapped(slot, param, self.state[param], self._storage)
            for index, (_, slot, param) in enumerate(self._members())
            if index in saved["state"]
        }
        saved["param_groups"] = [{**group, **extra} for group in saved["param_groups"]]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW; everything is checked before anything is changed.

        Dtypes survive. Anchors and ω are taken where this optimizer has importance, or records; saved α is used.

        Raises:
            ValueError: other groups, shapes or importance, or a state saved with amsgrad.
        """
        fingerprint = self._penalty.fingerprint if self._penalty else None
        state_dict = saved_form.after_pre_hooks(self, state_dict)
        _validate.state_dict(state_dict, self.param_groups, fingerprint, self._penalty_form, self._storage.master)
        _validate_lora.state_dict(state_dict, self.param_groups, list(self._space or ()), self._lora_form)
        saved_groups = state_dict["param_groups"]
        groups = list(map(saved_form.loaded_group, self.param_groups, saved_groups))
        coeffs = saved_groups[0].get("coeffs")
        balance = saved_groups[0].get("balance")
        if self._balance is not None:
            if balance is not None:
                _validate.coefficient_mapping(coeffs, set(self._balance.layers))
                self._balance.load(balance)
                self._version += 1
        elif coeffs is not None and self._penalty is not None and coeffs != dict(self._penalty.coeffs):
            self.set_coeffs(coeffs)
        if self._balance is None:
            self._coeffs_choice = saved_groups[0].get("coeffs_rule") or self._coeffs_choice
        anchors = {param: state["anchor"] for param, state in self.state.items() if "anchor" in state}
        saved_form.load_groups(self, super().load_state_dict, groups)
        keys = [key for group in saved_groups for key in group["params"]]
        for key, (_, slot, param) in zip(keys, self._members(), strict=True):
            saved, penalised = saved_form.local_parts(slot, param, state_dict["state"].get(key, {})), slot.penalised
            factor = slot.bound is not None
            state = saved_form.loaded(param, saved, self._storage, penalised, self.record, factor)
            if penalised and param in anchors:  # a plain AdamW's state has none: keep ours
                state.setdefault("anchor", anchors[param])
            if state:
                self.state[param] = state
        self._recorded_steps = int(saved_groups[0].get("recorded_steps") or 0) if self.record else 0
        self._device_steps = None
        self._bound = False

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in OWN_ATTRIBUTES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_handle" not in self.__dict__:  # a copy, or unpickled; torch's load_state_dict comes here too
            self._handle, self._attached = compiled.register(self), None
        self._calls, self._latest, self._curvature_checked = {}, [], {}
