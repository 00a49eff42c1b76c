"""Process groups, layouts, devices: the room that meets Megatron first."""

import warnings

# Without Transformer Engine and Apex, Megatron warns once a module. The layer spec that is used then is
# chosen on purpose (megatron_rapo.model.layer_spec), and the run says which.
warnings.filterwarnings("ignore", message=r"(Transformer Engine and Apex are|Apex is) not installed")
