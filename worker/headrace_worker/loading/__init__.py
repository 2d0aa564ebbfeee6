"""Reading a model: `load_model` is all that the rest of the worker needs."""

from __future__ import annotations

from headrace_worker.loading.load import LoadedModel, load_model

__all__ = ["LoadedModel", "load_model"]
