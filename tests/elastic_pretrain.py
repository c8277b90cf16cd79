"""Run by torchrun in test_pretrain.py: ``ffcl pretrain`` whose second process dies once, after the first epoch."""

import os
import sys

from ffcl_fast.cli import main
from ffcl_fast.pretrain import run

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    plain = run._Training._epoch

    def epoch(self, number):
        if number == 1:
            os._exit(9)
        return plain(self, number)

    run._Training._epoch = epoch

sys.exit(main(["pretrain", *sys.argv[1:]]))
