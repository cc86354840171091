"""How bytes of blocks move between two pools: one small interface, three implementations, one contract suite."""
