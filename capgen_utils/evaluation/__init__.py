"""Scores, baselines, results files, and tests of where a captioner looks."""
