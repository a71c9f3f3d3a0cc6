"""The bench: each figure is a ratio between this pipeline and a baseline, measured in one run on one machine.

    python -m bench [FIGURE ...] [--rounds N] [--quick]

Absolute rates depend on the machine; a ratio of two rates, taken in turns within minutes, much less. So each figure
names its baseline: code that a user would write instead, tuned as its own documentation advises (`bench/peers`).
"""
