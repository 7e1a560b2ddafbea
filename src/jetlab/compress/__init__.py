"""Compression of a NemotronH under a memory budget: Nemotron Nano 2's recipe (arXiv:2508.14444, Sec 4)."""
