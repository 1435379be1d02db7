"""Feature adversarial distillation for point clouds."""

from fad_loss._checks import debug

__all__ = ["debug"]
