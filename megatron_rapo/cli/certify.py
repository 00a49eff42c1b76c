"""`megatron-rapo certify`: a certificate that loss and gradient do not depend on the layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.config import load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.options import Options
from megatron_rapo.methods.rapo import RAPO


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    certify = commands.add_parser(
        "certify",
        help="prove that loss and gradient do not depend on the layout",
        description="Runs one batch under many layouts, in fp64 and fp32, on four processes of this machine, "
        "and compares loss and whole gradient with plain PyTorch.",
    )
    add_configuration(
        certify,
        help="whose objective, family and adapters to certify; default: RAPO on Qwen2",
        required=False,
    )
    certify.add_argument("--json", type=Path, metavar="FILE", help="write the certificate there, too")
    certify.set_defaults(command=_certify)


def _certify(options: argparse.Namespace) -> int:
    from megatron_rapo import preflight
    from megatron_rapo.certify.certificate import DEFAULT, as_json, certify, table

    algorithm: Options = RAPO.Options()
    architecture, adapter = DEFAULT, None
    if options.configs:
        config = load_config(options.configs, options.set)
        algorithm, architecture = config.algorithm, preflight.planned_architecture(config)
        adapter = config.adapter
    elif options.set:
        raise RapoError("--set needs a configuration to override; name one")
    results = certify(algorithm, architecture, adapter)
    print(table(results))
    if options.json is not None:
        options.json.write_text(as_json(results))
    return 0 if all(result.passed for result in results) else 1
