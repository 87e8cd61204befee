"""Where the installed `drover` begins: nothing is imported before signals can end it without a trace."""

import signal


def command() -> int:
    """The `drover` command. Signals end it without a trace from its first moment, while it is still being imported."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from cli.main import main

        return main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
