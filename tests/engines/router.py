"""SGLang's real router, without the web frameworks that its command line imports for debugging.

.venv-sglang/bin/python tests/engines/router.py PORT METRICS_PORT
"""

from __future__ import annotations

import sys

from sglang_router.router import Router
from sglang_router.router_args import RouterArgs

# By turns: each engine gets work, whatever the prompts are.
Router.from_args(
    RouterArgs(
        host="127.0.0.1", port=int(sys.argv[1]), policy="round_robin", prometheus_port=int(sys.argv[2])
    )
).start()
