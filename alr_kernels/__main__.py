"""`python -m alr_kernels` is `alr-kernels`."""

from .cli import app

if __name__ == "__main__":
    app()
