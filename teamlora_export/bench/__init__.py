"""How fast a model runs in several ways, side by side, and what its experts cost in each.

graphs, floor    a bundle's graph as it is deployed, the same with its experts bypassed, and what they add at least
rows             the ways to run it: a graph in ONNX Runtime, the adapted model in PyTorch
turns, alone     the measurement: strict turns in one process; load time and memory in a process of its own
measure, run     all of it, for any rows and for a bundle
report, plot     the figures as a table, as JSON, as an HTML page, as a PNG
"""
