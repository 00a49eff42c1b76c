"""The built-in rollout server: a HF model behind SGLang's HTTP contract, for where SGLang cannot run."""
