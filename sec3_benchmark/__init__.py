"""Section 3: how much does pre-training help ViT-Tiny? Tables 1 to 4."""
