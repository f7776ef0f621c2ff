"""Names of the files in a run folder that more than one module reads or writes (docs/run_folder.md)."""

RECORD = "run.json"
FLAGS = "resolved.flags"
RESULT = "result.json"
NOT_FINITE = "not_finite.json"  # of a run whose loss or weights were not finite numbers
METRICS = "metrics.jsonl"
EVALUATIONS = "eval.jsonl"
