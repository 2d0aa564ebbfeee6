"""What every Headrace service shares: vocabulary, wire format, Redis plumbing, telemetry, CLI."""

__version__ = "0.1.0"
