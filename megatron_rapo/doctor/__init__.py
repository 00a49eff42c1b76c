"""What is wrong between engines and trainer: fixed prompts, one hypothesis after the other."""
