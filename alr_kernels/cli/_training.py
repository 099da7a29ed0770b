"""stub"""

from __future__ import annotations
from ._options import Call


def train(call: Call) -> None: ...
