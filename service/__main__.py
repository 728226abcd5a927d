"""``anchorwell``, which is ``python -m service`` too."""

import gc


def main() -> None:
    """Run the command line."""
    gc.disable()  # what imports make stays, and is not looked through again and again, which is a tenth of a start
    from service import cli  # noqa: PLC0415 (now)

    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
