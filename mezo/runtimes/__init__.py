"""Runtimes: what turns (theta, batch) into option scores."""
