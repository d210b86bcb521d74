"""``python -m ptuning``."""

import signal


def main() -> None:
    """Load the command line and run it."""
    # While its modules load there is nothing to clean up, and Ctrl-C needs no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ptuning.cli.app import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
