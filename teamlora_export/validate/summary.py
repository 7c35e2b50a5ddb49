"""What a manifest keeps of a verdict."""

from __future__ import annotations

import dataclasses
import datetime

from teamlora_export.manifest import QualitySummary, Validation
from teamlora_export.validate.verdict import Quality, Verdict


def summary(verdict: Verdict) -> Validation:
    worst = verdict.worst
    tokens = [case for case in verdict.cases if case.greedy_tokens]
    return {
        "passed": verdict.passed,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "runtime": verdict.candidate,
        "cases": len(verdict.cases),
        "worst_output": worst.name,
        "worst_relative_error": worst.error.relative,
        "worst_times_pytorch": worst.times_pytorch,
        "greedy_tokens": sum(case.greedy_tokens for case in tokens),
        "greedy_equal": sum(case.greedy_equal for case in tokens),
        "weights": verdict.weights,
        "module_values": sum(len(check.judgements) for check in verdict.local),
        "first_departure": verdict.departure.module if verdict.departure else None,
        "quality": _quality_summary(verdict.quality) if verdict.quality else None,
    }


def _quality_summary(quality: Quality) -> QualitySummary:
    models = {"adapted": quality.adapted, "quantised": quality.quantised, "without experts": quality.base}
    figures = {name: dataclasses.asdict(measured) for name, measured in models.items()}
    summary: QualitySummary = {"passed": quality.passed, "figures": figures}
    if quality.scores:
        summary["scores"] = {
            f"{s.task}, {s.metric}": {"adapted": s.adapted, "quantised": s.quantised, "without experts": s.base}
            for s in quality.scores
        }
    return summary
