"""python -m sim MODE SEED N: one world of a sweep again."""

import sys

from sim.sweep import Place, run_place

mode, seed, cut_after = sys.argv[1:]
falls = run_place(Place(mode, int(seed), int(cut_after)))
print(f"{mode}, seed {seed}, cut after I/O {cut_after}: passed, fell {falls} times")
