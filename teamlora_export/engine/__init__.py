"""Engines: TensorRT with our plugin, or TensorRT-RTX, which needs neither plugin nor GPU to build.

`build.py` is the way through: `runtime.py` finds what the machine has, `prepare.py` makes the graph that a parser gets
(re-typed, bodies inlined or left to the plugin), `profiles.py` says which shapes, `facts.py` remembers. `load.py` opens
an engine, `refit.py` exchanges its adapter. `plugin.py` compiles the plugin, with what `toolchain.py` finds.
"""
