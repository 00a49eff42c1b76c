"""The part of a vLLM worker that the trainer asks by name (`--worker-extension-cls`, `/collective_rpc`)."""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_rapo.vllm_worker.receiver import Receiver

BACKEND = "rapo"  # as `--weight-transfer-config` names it
WeightTransferEngineFactory.register_engine(BACKEND, Receiver)


class Extension:
    """Becomes a base of the worker's class: `self` is the worker."""

    vllm_config: Any
    weight_transfer_engine: Any
    _weight_update_active: bool

    def rapo_describe(self) -> dict[str, Any]:
        """How the server was started, as far as a trainer must know."""
        config = self.vllm_config
        transfer = config.weight_transfer_config
        return {
            "model_path": str(config.model_config.model),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "ranks": config.parallel_config.world_size,
            "context_length": config.model_config.max_model_len,
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "sleep_mode": bool(config.model_config.enable_sleep_mode),
            "backend": None if transfer is None else transfer.backend,
        }

    def rapo_abandon(self) -> dict[str, bool]:
        """Ends an update that is open, without its weights.

        Returns:
            `whole`: whether the model is of use, without an update that brings all weights. In a dictionary,
            as vLLM's route makes texts of all else: `"False"`.
        """
        self._weight_update_active = False
        return {"whole": self.weight_transfer_engine.is_whole()}
