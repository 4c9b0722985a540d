"""Types of numeric arguments, with their range: the parser refuses a value outside of it.

    parser.add_argument("--epochs", type=Int(1))
    parser.add_argument("--mask-ratio", type=Float(0, 1))  # argument --mask-ratio: '75' is not a number from 0 to 1
"""
import argparse
import math
import sys


class Float:
    """The type of a finite number from `low` to `high`, both included; for other text argparse reports an error."""

    kind, words, most = float, "a number", sys.float_info.max

    def __init__(self, low, high=None):
        self.low, self.high = low, self.most if high is None else high

    def __call__(self, text):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if value not in self:
            raise argparse.ArgumentTypeError(f"{text!r} is not {self}")
        return value

    def __contains__(self, value):
        return self.low <= value <= self.high  # false for NaN

    def __str__(self):
        bounds = f"of at least {self.low}" if self.high == self.most else f"from {self.low} to {self.high}"
        return f"{self.words} {bounds}"


class Int(Float):
    """The type of a whole number from `low` to `high`, both included, that fits in 64 bits."""

    kind, words, most = int, "a whole number", 2**63 - 1
