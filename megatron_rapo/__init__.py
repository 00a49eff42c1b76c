"""RAPO at scale: RL with verifiable rewards on Megatron-Core, with rollouts from SGLang servers."""

__version__ = "0.1.0"
