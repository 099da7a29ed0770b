"""Scale on paper: bytes a device holds and moves with AlrAdamW, for any model, strategy and number of devices.

``models.py`` reads a model's tensors, ``counting.py`` shards and counts them, ``plan.py`` puts the columns together.
"""

from .counting import Column
from .devices import DEVICES, Device
from .models import Model, Weight, read_model
from .plan import Plan, plan
from .setup import Lora, Setup

__all__ = ["DEVICES", "Column", "Device", "Lora", "Model", "Plan", "Setup", "Weight", "plan", "read_model"]
