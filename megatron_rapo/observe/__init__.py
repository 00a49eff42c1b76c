"""What a run tells of itself: metrics, progress, and where each rank is."""

from megatron_rapo.observe.heartbeat import describe
from megatron_rapo.observe.observer import Observer

__all__ = ["Observer", "describe"]
