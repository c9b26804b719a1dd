"""MeZO as a torch optimizer: zeroth-order steps for any module and any closure, theta kept exactly in float32."""

from mezo.optim.optimizer import MeZO

__all__ = ["MeZO"]
