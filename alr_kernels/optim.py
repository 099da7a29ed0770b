"""AlrAdamW: AdamW with the element-wise, layer-weighted pull towards an anchor inside the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import _ops, _validate, _validate_backward, _validate_distributed, _validate_importance, _validate_lora, compiled
from . import state as _state
from .balance import Balance
from .codecs.storage import Storage
from .coefficients import RULES, DynamicCoeffs, LayerCoefficients
from .in_backward import Attachment
from .lora.pairs import LoraPairs, lora_pairs
from .lora.space import Space
from .names import unwrap
from .saving import Saving
from .step.plan import MASTERS, MODES


@compiled.outside(
    *("penalty", "penalty_by_layer", "stats", "grad_norm", "recorded_steps", "recorded_importance", "save_importance"),
    *("coeffs", "set_coeffs", "start_phase", "restart_recording", "add_param_group", "state_dict", "load_state_dict"),
)
class AlrAdamW(Saving):
    r"""AdamW that learns a domain while pulling important weights towards their anchor.

    Minimises ``task loss + λ Σ_l α_l Σ_i Ω_i (θ_i − θ*_i)²``; the penalty and its gradient live inside the step,
    in one pass over memory, and never appear in ``p.grad``. With ``k_i = 2·λ·α_l·Ω_i / normaliser``:

    * ``mode="proximal"`` (default): AdamW on the task gradient, then the penalty implicitly in Adam's own metric,
      ``θ ← h + lr·k/(D + lr·k) · (θ* − h)``, ``D = √(v/bc2) + eps``: stable for any λ·Ω, and with
      ``weight_decay=0`` it rests where the paper's loss is stationary.
    * ``mode="coupled"`` (the paper): ``g ← g + k(θ − θ*)``, then AdamW; equals autograd of the whole loss.

    With ``importance=None`` or ``reg_lambda=0`` it is AdamW.

    Args:
        params: tensors, (name, tensor) pairs as ``model.named_parameters()`` gives, or param groups, each of which may
            set ``lr``, ``betas``, ``eps``, ``weight_decay``, ``reg_lambda``, ``maximize``. float32, bfloat16, float16
            (moments and arithmetic float32) or float64 (by the reference).
        importance: Ω ≥ 0 shaped as the parameters: an :class:`Importance`, a mapping name → tensor (both need named
            parameters), a sequence aligned with ``params`` (None for no entry), or None. Parameters without an
            entry take the plain step. Its tensors are used, not copied: do not write into them.
        coeffs: α by layer: ``"softmax"``, ``"proportional"``, ``"uniform"``, a mapping layer → number, what
            :func:`layer_coefficients` returned, or :class:`DynamicCoeffs`, which re-balances them while tuning.
        lr, betas, eps, weight_decay: as torch.optim.AdamW; lr (and reg_lambda) may be tensors.
        reg_lambda: λ ≥ 0. With ``normalize`` the mean curvature k is 2λ for every model.
        mode: ``"proximal"`` or ``"coupled"``.
        normalize: divide by the mean of α·Ω over all entries of the importance (``select`` those of the trained
            parameters when others are frozen); ``False`` is the paper's raw form.
        anchor: θ* by name, for the parameters with importance (of LoRA pairs both factors); None takes their values at
            the first step.
        lora: what :func:`lora_pairs` returned, or (name, A, B, scaling) tuples: the importance of these pairs is that
            of U = s·B·A, named and shaped as the base weight, and so are penalty, recording and layers (each module
            one, unless ``coeffs`` says otherwise); all other parameters take theirs element by element, as ever.
        record: integrate ω += −g·Δθ in the same pass (works with and without a penalty).
        maximize: ascend.
        max_grad_norm: clip the task gradient's norm over all parameters inside the step, as
            ``torch.nn.utils.clip_grad_norm_`` before it would; ω is still recorded with the whole gradient, and
            ``optimizer.grad_norm`` holds the norm as a tensor. None: no clipping.
        importance_dtype: ``"fp32"``, ``"bf16"``, ``"int8"``, ``"int4"`` (block codes) or such torch dtypes; None: as it
            is given, so that an :class:`Importance` in codes is never decoded (one in rank1 is, to fp32).
        anchor_dtype: ``"fp32"`` or ``"bf16"`` (lossless for a bf16 checkpoint); None: as the parameter, which those of
            LoRA factors always are.
        state_dtype: of the moments, ``"fp32"``, ``"bf16"`` or ``"int8"`` (block codes). Vectors, tensors under 4096
            elements and, for codes, rows of no multiple of 128 stay fp32, importance likewise.
        master: of bf16 parameters. ``"split"``: an int16 remainder beside each makes it an exact fp32 number;
            ``"stochastic"``: rounded at random, keyed on (seed, step, parameter, global element index);
            ``"none"``: rounded to nearest.
        precise: IEEE division and square root; False: approximate ones, relative error about 1e-6.
        capturable: the step may be captured in a CUDA graph; numbers that change must then be tensors (lr, reg_lambda).
        stats: gather what :meth:`stats` returns, in the same pass.
        seed: of the random generator, in [0, 2^32).
        backend: ``"auto"``, ``"native"`` (C++, CPU), ``"triton"`` (GPU), ``"reference"`` (torch, anywhere).

    Raises:
        ValueError, TypeError: names, shapes, values or options that do not fit; the message says what to do.
        BackendUnavailableError: an explicit backend that cannot serve.

    Construction clones nothing; anchors are taken at the first step. A torch.optim.AdamW state_dict loads here.

    Source: arXiv 2501.13669, eq. 3-7.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    >>> optimizer = AlrAdamW(model.named_parameters(), importance, lr=1e-2, reg_lambda=0.1)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> float(optimizer.penalty()) > 0
    True
    """

    _step_supports_amp_scaling = True  # GradScaler's protocol: it sets grad_scale and found_inf

    def __init__(
        self,
        params: Iterable[Any],
        importance: Mapping[str, Tensor] | Sequence[Tensor | None] | None = None,
        coeffs: str | Mapping[str, float] | DynamicCoeffs = "softmax",
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        reg_lambda: float | Tensor = 1.0,
        mode: Literal["proximal", "coupled"] = "proximal",
        normalize: bool = True,
        anchor: Mapping[str, Tensor] | None = None,
        lora: LoraPairs | Iterable[tuple[str, Tensor, Tensor, float]] | None = None,
        record: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        importance_dtype: str | torch.dtype | None = None,
        anchor_dtype: str | torch.dtype | None = None,
        state_dtype: str | torch.dtype = "fp32",
        master: Literal["none", "split", "stochastic"] = "none",
        precise: bool = True,
        capturable: bool = False,
        stats: bool = False,
        seed: int = 0,
        backend: Literal["auto", "reference", "native", "triton"] = "auto",
        **unsupported: Any,
    ) -> None:
        _validate.unsupported_flags(unsupported)
        _validate_distributed.no_zero_redundancy()
        _validate.choice("mode", mode, MODES)
        _validate.choice("backend", backend, _ops.BACKENDS)
        _validate.choice("master", master, MASTERS)
        self._storage = Storage.of(importance_dtype, anchor_dtype, state_dtype, master)
        self._seed = _validate.seed(seed)
        self.mode, self.normalize, self.record, self.backend = mode, normalize, record, backend
        self.precise, self.capturable = precise, capturable
        self.max_grad_norm = max_grad_norm
        if max_grad_norm is not None:
            _validate.number("max_grad_norm", max_grad_norm, open_low=True)
        self._grad_norm: Tensor | None = None
        self._handle, self._attached = compiled.register(self), None
        self._slots: list[list[_state.Slot]] = []
        self._penalty: _state.Penalty | None = None
        self._balance: Balance | None = None
        self._space: Space | None = None
        self._anchor: dict[str, Tensor] | None = None
        self._bound = False
        self._recorded_steps = 0
        self._device_steps: Tensor | None = None  # recorded steps where only the device knows whether one was skipped
        self._coeffs_choice: Any = coeffs
        self._version = 0  # of the coefficients
        self._gathers_stats = stats
        self._calls, self._latest, self._curvature_checked = {}, [], {}
        values = (lr, betas, eps, weight_decay, reg_lambda, maximize)
        super().__init__(params, dict(zip(_state.OPTIONS, values, strict=True)))
        if master != "none":
            _validate.master(param for _, _, param in self._members())
        if lora is not None:
            self._take_pairs(lora)
        if importance is None and not record and (importance_dtype is not None or anchor_dtype is not None):
            _validate_importance.needs_importance("anchor_dtype" if anchor_dtype is not None else "importance_dtype")
        self._use(importance, coeffs)
        if anchor is not None:
            self._take_anchor(anchor)

    def _take_pairs(self, lora: LoraPairs | Iterable[tuple[str, Tensor, Tensor, float]]) -> None:
        pairs = lora if isinstance(lora, LoraPairs) else lora_pairs(lora)
        _validate_lora.recording(pairs.estimator, self.record, self.capturable)
        self._space = Space(pairs, self.param_groups, self._slots)

    def _take_anchor(self, anchor: Mapping[str, Tensor]) -> None:
        if self._penalty is None:
            _validate_importance.needs_importance("anchor")
        wanted = {slot.name: param for _, slot, param in self._members() if slot.penalised}
        self._anchor = _state.named_anchor(anchor, wanted)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters take the plain step until :meth:`start_phase` brings importance for them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _validate.group_options(group, _state.OPTIONS)
            offset = sum(len(slots) for slots in self._slots)
            names = group.get("param_names") or [f"params.{offset + i}" for i in range(len(group["params"]))]
            pairs = list(zip(names, group["params"], strict=True))
            slots = [_state.Slot(unwrap(name), offset + i, tuple(p.shape)) for i, (name, p) in enumerate(pairs)]
            for slot, param in zip(slots, group["params"], strict=True):
                _validate_distributed.not_flattened(slot.name, param)
                _validate.parameter(slot.name, param)
                if self.backend != "auto" and not param.is_meta:
                    _ops.choose_step_backend(self.backend, param.device, param.dtype)
            members = [(slot.name, param) for _, slot, param in self._members()]
            members += [(slot.name, param) for slot, param in zip(slots, group["params"], strict=True)]
            _validate.no_duplicates(members)
            _validate.distinct_names(name for name, _ in members)
            if self._space is not None:
                self._space.rename(slots, group["params"])
        except Exception:
            self.param_groups.pop()  # a refused group leaves the optimizer as it was
            raise
        self._slots.append(slots)
        for key in sorted(_state.SAVED_KEYS):  # torch's flattened states keep the keys that groups have, and no others
            group.setdefault(key, None)
        self._bound = False
        if self._attached is not None:
            self._attached.extend()

    def _use(self, importance: Any, coeffs: str | Mapping[str, float] | DynamicCoeffs) -> None:
        """Match importance with the parameters and weigh its layers; changes nothing when it raises."""
        members = [(slot, param) for _, slot, param in self._members()]
        named = self._space is not None or all(group.get("param_names") is not None for group in self.param_groups)
        entries = _state.named_importance(importance, members, named, self._space)
        if entries is None:
            if not isinstance(coeffs, str):
                _validate_importance.needs_importance("coeffs")
            _validate.choice("coeffs", coeffs, RULES)
            self._penalty, self._balance = None, None
        else:
            chosen = _state.Penalty.of(entries)
            self._weigh(chosen, coeffs)
            self._penalty = chosen
        self._coeffs_choice = coeffs
        sources = [slot for slot, _ in members if slot.bound is None]
        for source in [*sources, *(self._space or ())]:
            source.importance = entries.encoded(source.name) if entries is not None and source.name in entries else None
            source.placed = False
            source.unit_scale = source.unit_scale if source.importance is not None else 0.0
            source.largest = self._penalty.largest.get(source.name, 0.0) if self._penalty else 0.0
        self._bound = False

    def _weigh(self, chosen: _state.Penalty, coeffs: str | Mapping[str, float] | DynamicCoeffs) -> None:
        """Give every slot its curvature scale; changes nothing when it raises."""
        if isinstance(coeffs, DynamicCoeffs) and self.capturable:
            _validate.dynamic_and_capturable()
        scales = chosen.weigh(coeffs, self.normalize, "block" if self._space is None else "module")
        self._balance = None
        if isinstance(coeffs, DynamicCoeffs):
            self._balance = Balance(coeffs, chosen.coeffs, chosen.sums, chosen.numel, self.normalize)
            self._bound = False  # calls must gather statistics from here on
        sources = [slot for _, slot, _ in self._members() if slot.bound is None]
        for source in [*sources, *(self._space or ())]:
            source.unit_scale = scales.get(source.name, 0.0)
        self._version += 1

    @property
    def coeffs(self) -> LayerCoefficients | None:
        """The coefficients in use, layer → α; None without importance. Dynamic ones are read from the device."""
        if self._balance is not None:
            return self._balance.coeffs()
        return self._penalty.coeffs if self._penalty else None

    def set_coeffs(self, coeffs: str | Mapping[str, float] | DynamicCoeffs) -> None:
        """Change α from the next step on: a rule's name, a mapping layer → number, or :class:`DynamicCoeffs`.

        Raises:
            ValueError: there is no importance, or the layers do not fit.
        """
        if self._penalty is None:
            _validate_importance.needs_importance("set_coeffs")
        self._weigh(self._penalty, coeffs)
        self._coeffs_choice = coeffs

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step with the gradients in ``p.grad``: those of the task loss alone.

        ``closure``, if given, evaluates the model again and returns the loss. ``torch.amp.GradScaler`` hands its scale
        and its verdict over: gradients are unscaled in the step, and a step with infinities changes nothing.

        Raises:
            RuntimeError: a sparse gradient, or a parameter whose elements share memory. Nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_dynamo_compiling():
            compiled.step(self)
        else:
            self._step()
        return loss

    # An LR scheduler would wrap step() to set _opt_called itself, in a file that dynamo refuses to trace.
    setattr(step, "_wrapped_by_lr_sched", True)  # noqa: B010 - a function has no such attribute to mypy

    def _step(self) -> None:
        self._opt_called = True
        if self._attached is not None:
            self._attached.finish()
            return
        if not self._bound:
            self._bind()
        buckets = self._buckets()
        if not buckets:
            return
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inverse = 1.0 if scale is None else scale.double().reciprocal()
        clip = 1.0 if self.max_grad_norm is None else self._clip(buckets, inverse)
        shared = (inverse, clip, 0.0 if found_inf is None else found_inf)
        self._latest = self._step_buckets(buckets, shared)
        self._count_step(found_inf)

    def attach_to_backward(self) -> Attachment:
        """Step each parameter within backward, once its gradient is there (a LoRA pair: both), and free the gradient.

        The numbers are those of the normal step, bit for bit, and memory holds one gradient at a time. Call
        :meth:`step` after each backward pass as ever: it counts the step, re-balances :class:`DynamicCoeffs` and takes
        whatever gradient came another way; what is changed between steps (lr, λ, coefficients) acts on the next
        backward pass. A parameter or gradient that is refused raises out of ``backward()``, after others have moved.

        Returns:
            A handle whose ``remove()`` brings the normal step back; also a context manager.

        Raises:
            ValueError: with ``max_grad_norm``, ``capturable``, or several processes: these need all gradients at once.
            RuntimeError: attached already; a second gradient of a parameter before ``step()`` (accumulation), from
                ``backward()``; a GradScaler, from ``step()``.

        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AlrAdamW(model.named_parameters())
        >>> with optimizer.attach_to_backward():
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.grad is None
        True
        """
        _validate_backward.attachable(self)
        if self._attached is not None:
            _validate_backward.attached_twice()
        self._attached = Attachment(self)
        return self._attached

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that ``lora_pairs(estimator="exact")`` gathered included."""
        if torch.compiler.is_dynamo_compiling():
            compiled.zero_grad(self, set_to_none)
        else:
            super().zero_grad(set_to_none)
        if self._space is not None:
            self._space.drop_gradients()

    def start_phase(
        self,
        importance: Mapping[str, Tensor] | Sequence[Tensor | None] | None = None,
        coeffs: str | Mapping[str, float] | None = None,
    ) -> None:
        """Begin the next domain here: the anchor becomes the present weights and ω starts from zero.

        Moments and step counts go on; take ``recorded_importance()`` first. A refused importance changes nothing.

        Args:
            importance: the next phase's importance, as in the constructor; None keeps the present one.
            coeffs: the next phase's coefficients; None keeps what was given last: a rule's name is evaluated anew, a
                mapping (``layer_coefficients``' result included) is taken as it is.
        """
        if importance is not None:
            self._use(importance, self._coeffs_choice if coeffs is None else coeffs)
        elif coeffs is not None:
            self.set_coeffs(coeffs)
        for _, _, param in self._members():
            self.state.get(param, {}).pop("anchor", None)
        self._anchor = None
        self.restart_recording()

    def restart_recording(self) -> None:
        """Let ω start from zero at the present weights; the anchor stays. ``start_phase`` does it too."""
        for _, _, param in self._members():
            for key in ("start", "path_integral", _state.EFFECTIVE):
                self.state.get(param, {}).pop(key, None)
        self._bound = False
        self._recorded_steps, self._device_steps = 0, None

    def __repr__(self) -> str:
        plain = "importance: none, every parameter takes the plain AdamW step"
        members = self._members()
        penalised = sum(slot.penalised for _, slot, _ in members)
        covered = self._penalty.describe(penalised, len(members)) if self._penalty else plain
        covered += f"\n{self._space.describe()}" if self._space else ""
        shapes = [param.shape for _, slot, param in members if slot.bound is None and slot.penalised]
        shapes += [bound.geometry.shape for bound in self._space or () if bound.importance is not None]
        kept = self._storage.describe([param for _, _, param in members], shapes)
        how = f"mode: {self.mode}, backend: {self.backend}, record: {self.record}"
        groups = [x for x in super().__repr__().splitlines() if x.strip().split(":")[0] not in _state.SAVED_KEYS]
        return "\n".join([*groups, how, covered, kept])
