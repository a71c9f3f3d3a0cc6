"""Each alert seen firing in a real Prometheus over a real pipeline, and going silent after the mend: `make alerts`.

watch.py        the rules with short times, and a Prometheus that evaluates them
rig.py          a pipeline of real processes, whose parts can be taken away and given back
experiments.py  what is broken, which alerts must fire, how it is mended
"""
