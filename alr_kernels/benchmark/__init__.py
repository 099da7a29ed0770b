"""Timing one optimizer step against what users would write without it: `alr-kernels bench`, and bench/ for pytest."""
