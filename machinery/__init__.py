"""What a reader of the story may skip: how a run uses its surroundings, and goes on when they fail.

Nothing here imports the story: what is needed of it is handed in.
"""

import os

# The run says in a line what Ray's processes say of faults in twenty. Ray reads this when it loads, so
# every module imports what it needs of this folder before Ray.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "^(Raylet is|The node with|A worker died|Task .* failed|.*killed due to|WARNING: .* processes)",
)
