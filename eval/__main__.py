"""The `dit-accel-eval` command, also as `python -m dit_accel.eval`."""

from dit_accel.pipelines.extras import start


def main() -> None:
    start("dit_accel.eval.cli", "eval")


if __name__ == "__main__":
    main()
