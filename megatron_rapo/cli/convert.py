"""`megatron-rapo convert`: HF models into Megatron checkpoints, and back; adapters into PEFT directories."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    convert = commands.add_parser("convert", help="HF models into Megatron checkpoints, and back")
    convert.set_defaults(of=convert)
    directions = convert.add_subparsers(metavar="DIRECTION", title="directions")
    to_hf = directions.add_parser("to-hf", help="a Megatron checkpoint, such as a run's, into a HF model")
    to_hf.add_argument("source", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run's directory")
    to_hf.add_argument(
        "--model",
        type=Path,
        metavar="HF_DIRECTORY",
        help="whose config.json and tokenizer are carried over; default: those that the checkpoint tells",
    )
    to_hf.set_defaults(command=_convert_to_hf)
    to_peft = directions.add_parser(
        "to-peft", help="the adapters in a run's checkpoint into a PEFT directory"
    )
    to_peft.add_argument("source", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run's directory")
    to_peft.add_argument(
        "--model",
        type=Path,
        metavar="HF_DIRECTORY",
        help="the model that they are adapters of; default: that of the run",
    )
    to_peft.set_defaults(command=_convert_to_peft)
    to_megatron = directions.add_parser("to-megatron", help="a HF model into a Megatron checkpoint")
    to_megatron.add_argument("source", type=Path, metavar="HF_DIRECTORY", help="the model")
    to_megatron.set_defaults(command=_convert_to_megatron)
    for direction in (to_hf, to_peft, to_megatron):
        direction.add_argument(
            "destination", type=Path, metavar="DESTINATION", help="folder to make; must not exist"
        )


def _convert_to_hf(options: argparse.Namespace) -> int:
    from megatron_rapo.convert.to_hf import convert_to_hf
    from megatron_rapo.launch.stop import requests

    with requests.noted():  # so that what is half done is removed
        convert_to_hf(options.source, options.destination, options.model)
    return 0


def _convert_to_peft(options: argparse.Namespace) -> int:
    from megatron_rapo.convert.to_peft import convert_to_peft
    from megatron_rapo.launch.stop import requests

    with requests.noted():
        convert_to_peft(options.source, options.destination, options.model)
    return 0


def _convert_to_megatron(options: argparse.Namespace) -> int:
    from megatron_rapo.convert.to_megatron import convert_to_megatron
    from megatron_rapo.launch.stop import requests

    with requests.noted():
        convert_to_megatron(options.source, options.destination)
    return 0
