"""Every part of the pipeline on one machine, for `pipeline demo`, `pipeline up` and the tests."""
