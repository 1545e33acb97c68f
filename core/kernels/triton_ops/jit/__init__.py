"""The kernels themselves, in Triton. The only files of the tree that import it: the ops do so when they first run."""
