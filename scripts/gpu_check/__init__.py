"""What `scripts/check_gpu` runs: see `main.py`, which lists the steps in their order.

Nothing here needs more than Python, PyTorch and CUDA's compiler, so that it runs on a machine with nothing of ours.
"""
