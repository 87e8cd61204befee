"""The `drover` command.

Drover's folders have common names. An empty entry in PYTHONPATH stands for the working directory,
and a `client.py` there would take the place of ours. So Drover's root comes first.
"""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def command() -> int:
    """The `drover` command. Signals end it without a trace from its first moment, while it is still being imported."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from cli.main import main

        return main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
