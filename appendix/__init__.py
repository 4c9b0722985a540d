"""The paper's appendix, its claims, and tools."""
