"""python -m sim MODE SEED N [SHAPE [ENGINE_FAULTS STORE_FAULTS]]: one world of a sweep again."""

import sys

from sim.sweep import Place, run_place

mode, seed, cut_after, *rest = sys.argv[1:]
shape, engine_faults, store_faults = (*rest, *("usual", "0", "0")[len(rest) :])
place = Place(mode, int(seed), int(cut_after), shape, int(engine_faults), int(store_faults))
falls = run_place(place)
print(f"{mode}, seed {seed}, cut after I/O {cut_after}: passed, fell {falls} times")
