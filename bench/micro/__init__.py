"""pytest-benchmark of the C core: codec, slots, the store's log and map."""
