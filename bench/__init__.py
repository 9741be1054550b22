"""The benchmark: lanes side by side in one run, ratios against the figures to reach."""
