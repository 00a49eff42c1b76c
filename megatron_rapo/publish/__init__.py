"""The policy's weights to the engines, and the proof that they arrived."""
