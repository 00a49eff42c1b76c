"""What to do about each cause."""

NOT_LOADED = (
    "the server takes an update and does not load it: look into its log, update SGLang, or send the weights "
    "another way"
)
OTHER_WEIGHTS = (
    "the engine had other weights than the run. A run publishes before it samples: if they come back, "
    "something restarts or updates the server meanwhile; give every run its own servers"
)
STALE_CACHE = (
    "what was made with other weights outlives an update: start the server without its prefix cache (SGLang: "
    "--disable-radix-cache); remove a proxy that keeps answers"
)
SHARED_BEGINNINGS = (
    "prompts that share a beginning spoil each other: start the server without its prefix cache (SGLang: "
    "--disable-radix-cache)"
)
VOCABULARY = (
    "the engine gives probability to rows of the head that are no tokens, or serves another vocabulary: "
    "serve the model directory and tokenizer that are trained; against what is left, set "
    'algorithm.importance_correction = "truncated"'
)
TRUNCATION = (
    "a run asks for top_p = 1 and top_k = -1: remove what overrides that or adds to it in the server "
    "(SGLang: --preferred-sampling-params, which may hold min_p and penalties) or in a proxy before it"
)
OTHER_TEMPERATURE = (
    "the trainer divides its logits by rollout.temperature, and the engine must do alike: remove what "
    "overrides the temperature in the server or in a proxy before it"
)
REPORTED_TEMPERATURE = (
    "the engine samples as asked, but reports log-probs of another temperature; SGLang: unset "
    "SGLANG_RETURN_ORIGINAL_LOGPROB, so that they are of the scaled distribution"
)
KERNELS = (
    "nothing else explains it: engine and trainer compute the same weights differently. Serve in the type of "
    "model.dtype, without quantisation, and try another attention backend. Against what is left, set "
    'algorithm.importance_correction = "truncated"'
)
DECODING = (
    "the engine's prefill agrees with the trainer, its decoding does not: keep keys and values in the type "
    "of model.dtype (SGLang: no --kv-cache-dtype fp8…), and try another attention backend for decoding, no "
    "CUDA graphs, no speculative decoding. Against what is left, set "
    'algorithm.importance_correction = "truncated"'
)
