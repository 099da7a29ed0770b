"""What a step within backward refuses: part of the table of tests/test_validation.py."""

from __future__ import annotations

from unittest import mock

import torch
from cases import tiny_loss, tiny_model, tiny_optimizer

from alr_kernels import AlrAdamW


def attached(**options):
    model = tiny_model()
    optimizer = tiny_optimizer(model, **options)
    optimizer.attach_to_backward()
    return model, optimizer


def twice():
    _, optimizer = attached()
    optimizer.attach_to_backward()


def accumulating():
    model, _ = attached()
    for _ in range(2):
        tiny_loss(model).backward()


def scaled(unscale=False):
    model, optimizer = attached()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(tiny_loss(model)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)


def clipped_from_now_on():
    model, optimizer = attached()
    tiny_loss(model).backward()
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    tiny_loss(model).backward()


def in_two_processes():
    with mock.patch("alr_kernels._ranks.place", return_value=(0, 2)):
        attached()


def by_hand():
    """A gradient that is set after the parameter has been stepped with its own."""
    model, optimizer = attached()
    tiny_loss(model).backward()
    model.head.bias.grad = torch.ones(1)
    optimizer.step()


def capturable():
    AlrAdamW([("w", torch.nn.Parameter(torch.ones(2)))], capturable=True).attach_to_backward()


REFUSED = {
    "clipping in backward": (
        lambda c: attached(max_grad_norm=1.0), ValueError, "max_grad_norm=1.0 clips by the norm over all.*after back",
    ),
    "clipping in backward, later": (lambda c: clipped_from_now_on(), ValueError, "max_grad_norm=1.0 clips"),
    "capturable in backward": (lambda c: capturable(), ValueError, "capturable=True.*not replayed; use capturable=F"),
    "several processes in backward": (lambda c: in_two_processes(), ValueError, "single process, got 2.*averaged"),
    "attached twice": (lambda c: twice(), RuntimeError, r"attached already; call remove\(\)"),
    "accumulation in backward": (
        lambda c: accumulating(), RuntimeError, r"parameter '.*': a second gradient before optimizer.step\(\).*remove",
    ),
    "a gradient by hand after backward": (lambda c: by_hand(), RuntimeError, "'head.bias': a second gradient"),
    "a scaler in backward": (lambda c: scaled(), RuntimeError, "GradScaler looks for infinities.*bfloat16"),
    "a scaler that has unscaled": (lambda c: scaled(unscale=True), RuntimeError, "GradScaler looks for infinities"),
}  # fmt: skip
