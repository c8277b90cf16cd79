"""``python -m ffcl_fast.train``: the same as ``ffcl train``, for launchers that start modules."""

import sys

from ffcl_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
