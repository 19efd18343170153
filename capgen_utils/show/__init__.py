"""Plots and widgets."""
