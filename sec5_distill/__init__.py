"""Section 5: distilling attention during pre-training. Figures 6 and 7, Table 5."""
