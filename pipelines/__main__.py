"""The `dit-accel` command, also as `python -m dit_accel.pipelines`."""

from dit_accel.pipelines.extras import start


def main() -> None:
    start("dit_accel.pipelines.cli", "cli")


if __name__ == "__main__":
    main()
