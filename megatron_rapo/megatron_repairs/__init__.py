"""What this package changes in megatron-core: all of it, installed once (`install`)."""
