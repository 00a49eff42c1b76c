"""The parts of `make_tiny_model.py`: a small base model that can, but seldom does, solve Countdown."""
