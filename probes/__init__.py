"""Probes: store → X, y → solver → evaluation → report."""
