"""Write the demo's tasks into a folder: `python -m service.demo_tasks DIR`."""

import argparse
from pathlib import Path

from service.demo_tasks import NUM_EVAL_ROWS, NUM_TRAIN_ROWS, SEED, write_tasks


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(prog="python -m service.demo_tasks", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train-rows", type=int, default=NUM_TRAIN_ROWS)
    parser.add_argument("--eval-rows", type=int, default=NUM_EVAL_ROWS)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    write_tasks(
        options.folder,
        num_train_rows=options.train_rows,
        num_eval_rows=options.eval_rows,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
