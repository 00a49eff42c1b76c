"""What both ends of a wire share: trainer and engines agree on it, whichever program an engine is."""
