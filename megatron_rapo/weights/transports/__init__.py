"""Ways for weights from the trainer to the engines, one file each."""
