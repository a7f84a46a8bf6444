"""What the constants at the top of driver.py may be; a constant that is new there needs a rule here."""

import math
from collections import namedtuple

from machinery.errors import InputError, one_line

# What a constant must be: a function that tells whether a value is so, and words for it.
Rule = namedtuple("Rule", "holds words")


def whole(least):
    """The rule for whole numbers from `least` on. NumPy's are none: they are written in another way."""
    return Rule(lambda v: type(v) is int and v >= least, f"a whole number from {least} on")


def number(least, most=math.inf, but=None):
    """The rule for finite numbers from `least` to `most`, without `but`."""
    words = f"a number from {least} on" if most == math.inf else f"a number from {least} to {most}"
    return Rule(
        lambda v: isinstance(v, int | float) and math.isfinite(v) and least <= v <= most and v != but,
        words if but is None else f"{words}, but not {but}",
    )


def either(value, rule):
    """The rule that allows one value more than another rule."""
    return Rule(lambda v: v == value or rule.holds(v), f"{value!r} or {rule.words}")


def one_of(*values):
    """The rule for a choice between values."""
    return Rule(lambda v: v in values, " or ".join(map(repr, values)))


POSITIVE = number(0, but=0)
UNLIMITED = either(math.inf, POSITIVE)

RULES = {
    "NUM_WORKERS": either(None, whole(1)),
    "CPUS_PER_WORKER": whole(1),
    "GPUS_PER_WORKER": whole(0),
    "WORKER_WAIT": UNLIMITED,
    "WORKER_TIMEOUT": UNLIMITED,
    "TASK_TIMEOUT": UNLIMITED,
    "MINI_BATCH": whole(1),
    "STORED": one_of(None, "pixels", "jpeg"),
    "CHECK_TARS": one_of(True, False),
    "SHUFFLE_ROUNDS": whole(0),
    "ACCURACY_EVERY": whole(0),
    "ACCURACY_SAMPLE": whole(1),
    "VALIDATE_EVERY": whole(0),
    "CHECKPOINT_EVERY": whole(0),
    "CHECKPOINT_MINUTES": number(0),
    "LEARNING_RATE": POSITIVE,
    "LEARNING_RATE_IMAGES": POSITIVE,
    "LEARNING_RATE_POWER": number(0, 1),
    "WARM_UP": number(0),
    "LEARNING_RATE_DROPS": Rule(
        lambda v: isinstance(v, list | tuple) and all(map(number(0).holds, v)),
        "numbers of images in brackets, such as (100_000,)",
    ),
    "MOMENTUM": number(0, 1, but=1),
    "WEIGHT_DECAY": number(0),
    "CLIP_NORM": UNLIMITED,
    "PRECISION": one_of(None, "float32", "bfloat16"),
    "KEEP_PROBABILITY": number(0, 1, but=0),
    "INITIAL_WEIGHTS": either("he", POSITIVE),
    "NUM_CLASSES": whole(1),
    "SEED": whole(0),
}


def check(values, are_layers):
    """InputError unless every constant in a dict of name -> value is as its rule says.

    `are_layers` is the rule for LAYERS, which the network knows.
    """
    words = "a table of layers as in alexnet.py, dense ones last, none of size 0"
    for name, rule in {**RULES, "LAYERS": Rule(are_layers, words)}.items():
        if not rule.holds(values[name]):
            value = one_line(repr(values[name]))[:60]
            raise InputError(f"{name} = {value} in driver.py: it must be {rule.words}")
