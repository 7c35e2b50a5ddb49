"""`python -m gpu_check.decode ENGINE...`: seconds of a decoding step of each, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from teamlora_export.engine.facts import read_facts
from teamlora_export.engine.load import load_engine, open_engine_runtime
from teamlora_export.engine.timing import time_engine
from teamlora_export.progress import Reporter


def main(paths: list[Path]) -> None:
    times = {}
    for path in paths:
        facts = read_facts(path)
        runtime = open_engine_runtime(path, facts)
        engine = load_engine(path, facts, runtime, None, None, Reporter())
        times[path.stem] = time_engine(engine, runtime.trt, facts.profiles)
    print(json.dumps(times))


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
