"""The paper's appendix, and the tools around the tables."""
