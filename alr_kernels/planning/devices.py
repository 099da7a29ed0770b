"""What devices hold and how fast their memory is, as their makers publish it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device's memory in bytes and its bandwidth in bytes a second; None: not known, and nothing is said of it."""

    name: str
    memory: float | None
    bandwidth: float | None


def _published(name: str, gigabytes: float, gigabytes_a_second: float) -> Device:
    return Device(name, gigabytes * 1e9, gigabytes_a_second * 1e9)


# Figures of the data sheets, decimal units; a copy reaches about nine tenths of the bandwidth.
DEVICES = {
    "A100-40GB": _published("A100-40GB", 40, 1555),  # NVIDIA A100 data sheet, SXM 40 GB: 1,555 GB/s
    "A100": _published("A100", 80, 2039),  # NVIDIA A100 data sheet, SXM 80 GB: 2,039 GB/s
    "H100": _published("H100", 80, 3350),  # NVIDIA H100 data sheet, SXM: 80 GB, 3.35 TB/s
    "H200": _published("H200", 141, 4800),  # NVIDIA H200 data sheet: 141 GB, 4.8 TB/s
    "B200": _published("B200", 180, 8000),  # NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s for eight
    "MI300X": _published("MI300X", 192, 5300),  # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s
}
