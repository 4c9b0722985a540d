"""Section 4: what pre-training does to layers and attention. Figures 1 to 5."""
