"""HF models into Megatron checkpoints and back: one process, no GPU, about one layer of memory."""
