"""A rank that waits for its launcher to end, as the trainer's does."""

import sys
from pathlib import Path

from app.parent import die_with_parent
from tests.worker.training.scripted_rank import main

if __name__ == "__main__":
    die_with_parent()
    main(Path(sys.argv[1]), ["hang", "hang"])
