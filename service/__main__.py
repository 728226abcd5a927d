"""``anchorwell``, which is ``python -m service`` too."""

import gc
import sys


def main() -> None:
    """Run the command line; what serves begins its engine sooner without the other commands."""
    gc.disable()  # what imports make stays, and is not looked through again and again, which is a tenth of a start
    if sys.argv[1:2] in (["serve"], ["worker"]):
        from service import cli_serve as cli  # noqa: PLC0415 (now)
    else:
        from service import cli  # type: ignore[no-redef]  # noqa: PLC0415 (now)
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
