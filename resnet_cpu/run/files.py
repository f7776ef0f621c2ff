"""Names of files in a run folder that several modules read or write; docs/run_folder.md describes all of them."""

RECORD = "run.json"
FLAGS = "resolved.flags"
RESULT = "result.json"
NOT_FINITE = "not_finite.json"  # of a run whose loss or weights were not finite numbers
CLOCK = "clock.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "eval.jsonl"
