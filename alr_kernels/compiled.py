"""``step()`` inside a ``torch.compile``d region: one opaque op, ``torch.ops.alr_kernels.optimizer_step_``.

The graph holds parameters, gradients and the optimizer's name, nothing else; the op looks the optimizer up when it runs
and takes the eager step. So no guard ever sees a learning rate, λ, coefficients or state, and none of them recompiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optim import AlrAdamW

Class = TypeVar("Class", bound=type)

_LIVE: WeakValueDictionary[str, AlrAdamW] = WeakValueDictionary()
_NUMBERS = itertools.count()


def register(optimizer: AlrAdamW) -> str:
    """Return the name by which graphs know this optimizer: a string, which unlike an int never becomes symbolic."""
    handle = str(next(_NUMBERS))
    _LIVE[handle] = optimizer
    return handle


def outside(*names: str) -> Callable[[Class], Class]:
    """Let these methods break a graph: what they read or change, an opaque step before them has not yet shown."""

    def decorate(cls: Class) -> Class:
        for name in names:
            found = getattr(cls, name)
            if isinstance(found, property):
                setattr(cls, name, property(torch.compiler.disable(found.fget), doc=found.__doc__))
            else:
                setattr(cls, name, torch.compiler.disable(found))
        return cls

    return decorate


def members(optimizer: AlrAdamW) -> list[Tensor]:
    """Return all parameters. Past ``optimizer.param_groups``, where dynamo would guard on every number of a group."""
    return [param for group in optimizer.__dict__["param_groups"] for param in group["params"]]


def step(optimizer: AlrAdamW) -> None:
    """Put the step into the graph that is being traced."""
    positions = [i for i, param in enumerate(members(optimizer)) if param.grad is not None]
    params = [members(optimizer)[i] for i in positions]
    plain = all(type(param) in (Tensor, torch.nn.Parameter) for param in params)
    if not plain or optimizer._attached is not None or _groups_changed(optimizer._handle):
        _step_outside(optimizer)  # for tensor subclasses torch needs a rule of each op
        return
    grads = [param.grad for param in params]
    scaling = (getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))
    torch.ops.alr_kernels.optimizer_step_(params, grads, positions, *scaling, optimizer._handle)


@torch.compiler.assume_constant_result
def _groups_changed(handle: str) -> bool:
    """Whether the function being traced has set lr, λ or the like, which dynamo would write after the step.

    Runs while it is traced. Breaking the graph writes them first; torch's own optimizers break it there too.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        effects = InstructionTranslator.current_tx().output.side_effects
        found = [effects.id_to_variable.get(id(group)) for group in _LIVE[handle].param_groups]
        return any(effects.is_modified(variable) for variable in found if variable is not None)
    except AttributeError:  # another torch: its internals are not ours
        return False


@torch.compiler.disable
def _step_outside(optimizer: AlrAdamW) -> None:
    optimizer._step()


def zero_grad(optimizer: AlrAdamW, set_to_none: bool) -> None:
    """Do as torch's ``zero_grad``, which would make dynamo guard on the groups."""
    for param in members(optimizer):
        if set_to_none:
            param.grad = None
        elif param.grad is not None:
            if param.grad.requires_grad:
                param.grad = param.grad.detach()
            param.grad.zero_()


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object these attributes, and afterwards those that it had."""
    missing = object()
    kept = {name: getattr(owner, name, missing) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in kept.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _optimizer_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], positions: Sequence[int], grad_scale: Tensor | None,
    found_inf: Tensor | None, handle: str,
) -> None:  # fmt: skip
    """Take the eager step with what the graph has.

    ``p.grad`` is still what it was before the graph, whose own gradients get there when it is done. Where the graph
    works on a copy of a parameter it still reads the parameter for its old value, and writes it in the end: it is the
    copy that is stepped.
    """
    optimizer = _LIVE[handle]
    given = dict(zip(positions, zip(params, grads, strict=True), strict=True))
    with ExitStack() as stack:
        for position, own in enumerate(members(optimizer)):
            param, grad = given.get(position, (own, None))
            if own.grad is not grad:
                stack.enter_context(_replaced(own, grad=grad))
            if param.data_ptr() != own.data_ptr():
                stack.enter_context(_replaced(own, data=param))
        stack.enter_context(_replaced(optimizer, grad_scale=grad_scale, found_inf=found_inf))
        optimizer._step()


_LIBRARY = torch.library.Library("alr_kernels", "FRAGMENT")
_LIBRARY.define(
    "optimizer_step_(Tensor(a!)[] params, Tensor[] grads, int[] positions, Tensor? grad_scale, Tensor? found_inf, "
    "str handle) -> ()",
    tags=[torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else [],  # the host counts steps
)
_LIBRARY.impl("optimizer_step_", _optimizer_step, "CompositeExplicitAutograd")


@torch.library.register_fake("alr_kernels::optimizer_step_", lib=_LIBRARY)
def _optimizer_step_fake(*_: Any) -> None:
    return None
