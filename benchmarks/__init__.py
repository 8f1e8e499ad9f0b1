"""Benchmarks: ratios inside one run, each contender in its own process, equal results shown before any time.

``python -m benchmarks`` runs them all, prints a table with every bar as held or missed, and writes JSON.
"""
