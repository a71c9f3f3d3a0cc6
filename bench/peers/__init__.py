"""The baselines: what people write instead, each tuned as its own documentation advises."""
