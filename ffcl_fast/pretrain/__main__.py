"""``python -m ffcl_fast.pretrain``: the same as ``ffcl pretrain``, for torchrun's ``-m``."""

import sys

from ffcl_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
