"""How a run uses its surroundings. Readers of the story may skip this; it imports none of it."""

import os

# Ray reads these when it loads, so every module imports what it needs of this folder before Ray.
# The run says in a line what Ray's processes say of faults in twenty. A task that Ray's memory monitor
# has ended so many times fails: by Ray's growing pauses, memory is short for minutes then.
_FAULTS = "Raylet is|The node with|A worker died|Task .* failed|.*killed due to|WARNING: .* processes"
for _name, _value in ("RAY_DEDUP_LOGS_SKIP_REGEX", f"^({_FAULTS})"), ("RAY_task_oom_retries", "10"):
    os.environ.setdefault(_name, _value)
