"""The HTTP service. It knows neither the trainer nor torch (kept by import-linter)."""

__version__ = "0.1.0"
