"""The certificate: loss and whole gradient at every layout against plain PyTorch on one process."""
